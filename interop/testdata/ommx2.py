# Version 2 of the OMMX SDK. Each command prints the instance it has made or read.
#   make ARCHIVE  builds an artifact into ARCHIVE, one without a name into ARCHIVE.unnamed,
#                 and two into the tree at $OMMX_LOCAL_REGISTRY_ROOT
#   read PATH     loads an archive or a layout directory
#   load NAME     loads from the tree, else from the registry in NAME
#   push ARCHIVE  sends an archive to the registry in its name
import sys

from ommx.artifact import Artifact, ArtifactBuilder
from ommx.v1 import DecisionVariable, Instance


def make(archive):
    x = [DecisionVariable.binary(i) for i in range(3)]
    instance = Instance.from_components(
        decision_variables=x, objective=sum(x), constraints=[sum(x) == 1], sense=Instance.MAXIMIZE)
    instance.title = 'a "title" with <&> é'
    for builder in (
        ArtifactBuilder.new_archive(archive, "ghcr.io/example/demo:v1"),
        ArtifactBuilder.new_archive_unnamed(archive + ".unnamed"),
        ArtifactBuilder.new("ghcr.io/example/demo:v1"),
        ArtifactBuilder.new("localhost:5000/odd__repo/demo:my__tag"),
    ):
        builder.add_instance(instance)
        builder.add_annotation("org.ommx.user.note", "kept")
        builder.build()
    return instance


def push(archive):
    artifact = Artifact.load_archive(archive)
    artifact.push()
    return artifact.instance


commands = {
    "make": make,
    "read": lambda path: Artifact.load_archive(path).instance,
    "load": lambda name: Artifact.load(name).instance,
    "push": push,
}
print(commands[sys.argv[1]](sys.argv[2]).to_bytes().hex())
