# make ARCHIVE: builds an artifact into ARCHIVE and two into the legacy tree at
# $OMMX_LOCAL_REGISTRY_ROOT. read ARCHIVE: loads it. Both print the instance.
import sys
from ommx.v1 import DecisionVariable, Instance
from ommx.artifact import Artifact, ArtifactBuilder

command, archive = sys.argv[1:]
if command == "make":
    x = [DecisionVariable.binary(i) for i in range(3)]
    instance = Instance.from_components(
        decision_variables=x, objective=sum(x), constraints=[sum(x) == 1], sense=Instance.MAXIMIZE)
    for builder in (
        ArtifactBuilder.new_archive(archive, "ghcr.io/example/demo:v1"),
        ArtifactBuilder.new("ghcr.io/example/demo:v1"),
        ArtifactBuilder.new("localhost:5000/odd__repo/demo:my__tag"),
    ):
        builder.add_instance(instance)
        builder.build()
    print(instance.to_bytes().hex())
else:
    print(Artifact.load_archive(archive).instance.to_bytes().hex())
