package ocilocal_test

import (
	"fmt"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestOMMXBuilderType compares the constants of artifact types with their texts. NewOMMXBuilder
// keeps a type that its options give.
func TestOMMXBuilderType(t *testing.T) {
	r := openTemp(t, nil)
	for given, want := range map[string]string{
		"":                                  "application/org.ommx.v1.artifact",
		ocilocal.ArtifactTypeOMMXExperiment: "application/org.ommx.v1.experiment",
	} {
		b, err := r.NewOMMXBuilder(ref("example.com/type:v"+fmt.Sprint(len(given))), &ocilocal.BuilderOptions{ArtifactType: given})
		if err != nil {
			t.Fatal(err)
		}
		a, err := b.Build(t.Context())
		if err != nil || a.ArtifactType() != want {
			t.Errorf("%q: %v, %v", given, a, err)
		}
	}
}
