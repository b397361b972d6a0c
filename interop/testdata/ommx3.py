# The same as ommx2.py with version 3 of the SDK, which keeps a registry of its own.
import sys

from ommx import DecisionVariable, Instance
from ommx.artifact import Artifact, ArtifactDraft


def make(archive):
    x = [DecisionVariable.binary(i) for i in range(3)]
    instance = Instance.from_components(
        decision_variables=x, objective=sum(x), constraints={0: sum(x) == 1}, sense=Instance.MAXIMIZE)
    instance.title = 'a "title" with <&> é'
    draft = ArtifactDraft.new("ghcr.io/example/demo:v1")
    draft.add_instance(instance)
    draft.add_annotation("org.ommx.user.note", "kept")
    draft.commit().save(archive)
    return instance


def experiment(name):
    from ommx.experiment import Experiment
    with Experiment(name) as e, e.run() as run:
        e.log_json("dataset", {"name": "demo"})
        run.log_parameter("capacity", 10)
    return Instance.from_components(decision_variables=[], objective=0, constraints={}, sense=Instance.MAXIMIZE)


def push(archive):
    artifact = Artifact.import_archive(archive)
    artifact.push()
    return artifact.instance


commands = {
    "make": make,
    "read": lambda path: Artifact.import_archive(path).instance,
    "load": lambda name: Artifact.load(name).instance,
    "push": push,
    "experiment": experiment,
}
print(commands[sys.argv[1]](sys.argv[2]).to_v1_bytes().hex())
