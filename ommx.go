package ocilocal

// Artifact types of the OMMX project. The SDKs read artifacts of these types only as image
// manifests ([FormatImageManifest]).
const (
	ArtifactTypeOMMX           = "application/org.ommx.v1.artifact"
	ArtifactTypeOMMXExperiment = "application/org.ommx.v1.experiment" // of SDK v3: the runs of an experiment
)

// Media types in OMMX artifacts of the SDKs v1 and v2. Version 3 reads them too. OMMX artifacts
// also have layers of common types, such as application/json, application/vnd.numpy and
// application/vnd.apache.parquet.
const (
	MediaTypeOMMXConfig             = "application/org.ommx.v1.config+json" // SDK v3 writes the empty config {}
	MediaTypeOMMXInstance           = "application/org.ommx.v1.instance"
	MediaTypeOMMXParametricInstance = "application/org.ommx.v1.parametric-instance"
	MediaTypeOMMXSolution           = "application/org.ommx.v1.solution"
	MediaTypeOMMXSampleSet          = "application/org.ommx.v1.sample-set"
)

// Media types of layers that SDK v3 writes. Older SDKs do not read them.
const (
	MediaTypeOMMXInstanceV2           = "application/org.ommx.v2.instance"
	MediaTypeOMMXParametricInstanceV2 = "application/org.ommx.v2.parametric-instance"
	MediaTypeOMMXSolutionV2           = "application/org.ommx.v2.solution"
	MediaTypeOMMXSampleSetV2          = "application/org.ommx.v2.sample-set"
	MediaTypeOMMXTrace                = "application/org.ommx.trace.otlp+protobuf" // OpenTelemetry spans of an experiment
	MediaTypeOMMXDiagnostic           = "application/org.ommx.diagnostic+msgpack"
)
