# The same as ommx2.py with version 3 of the SDK.
import sys
from ommx import DecisionVariable, Instance
from ommx.artifact import Artifact, ArtifactDraft

command, archive = sys.argv[1:]
if command == "make":
    x = [DecisionVariable.binary(i) for i in range(3)]
    instance = Instance.from_components(
        decision_variables=x, objective=sum(x), constraints={0: sum(x) == 1}, sense=Instance.MAXIMIZE)
    draft = ArtifactDraft.new("ghcr.io/example/three:v1")
    draft.add_instance(instance)
    draft.commit().save(archive)
else:
    instance = Artifact.import_archive(archive).instance
print(instance.to_v1_bytes().hex())
