package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestVerifyResumes stops a verification in the middle. Another one goes on after the last blob
// that the first had finished. Together they report each problem once, in the order of digests.
func TestVerifyResumes(t *testing.T) {
	r := openTemp(t, artifactForm)
	for i := range 20 {
		published(t, r, fmt.Sprintf("example.com/a:%d", i), fmt.Sprint("layer", i), nil)
	}
	victims := blobNames(t, r)
	for _, d := range victims {
		os.Chmod(blobFile(r, d), 0o600)
	}
	var last ocilocal.Progress
	var seen []digest.Digest
	for p, err := range r.Verify(t.Context(), &ocilocal.VerifyOptions{Progress: func(p ocilocal.Progress) {
		if p.ItemDone {
			last = p
		}
	}}) {
		if err != nil {
			t.Fatal(err)
		}
		if seen = append(seen, p.Digest); len(seen) == 11 {
			break // the eleventh is not done with
		}
	}
	if last.Items != 10 || last.TotalItems != 40 || last.Item.Digest != seen[9] || last.Bytes == 0 {
		t.Errorf("%+v", last)
	}
	seen = seen[:10]
	for p, err := range r.Verify(t.Context(), &ocilocal.VerifyOptions{After: last.Item.Digest}) {
		if err != nil {
			t.Fatal(err)
		}
		seen = append(seen, p.Digest)
	}
	if !slices.Equal(seen, victims) {
		t.Errorf("saw %d problems, want %d in the order of digests", len(seen), len(victims))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var err error
	for _, err = range r.Verify(ctx, nil) {
	}
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
