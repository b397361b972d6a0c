# Versions 0.5 and 1 of the OMMX SDK: builds an artifact into an archive.
import sys

from ommx.artifact import ArtifactBuilder
from ommx.v1 import DecisionVariable, Instance

x = [DecisionVariable.binary(i) for i in range(3)]
instance = Instance.from_components(
    decision_variables=x, objective=x[0] + x[1], constraints=[x[0] + x[1] + x[2] == 1], sense=Instance.MAXIMIZE)
builder = ArtifactBuilder.new_archive(sys.argv[1], "ghcr.io/example/demo:v1")
builder.add_instance(instance)
builder.add_annotation("org.ommx.user.note", "kept")
builder.build()
