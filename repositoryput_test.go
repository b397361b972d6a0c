package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestPutBlob: bytes with a wrong digest or size are not kept. The digest and the size may be
// unknown.
func TestPutBlob(t *testing.T) {
	r := openTemp(t, nil)
	p := repository(t, r, "localhost/app")
	good := digest.FromString("content")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	failed := errors.New("read failed")
	for what, c := range map[string]struct {
		ctx  context.Context
		src  io.Reader
		want digest.Digest
		size int64
		err  error
	}{
		"wrong digest": {t.Context(), strings.NewReader("contents"), good, -1, ocilocal.ErrDigestMismatch},
		"short":        {t.Context(), strings.NewReader("conten"), good, 7, ocilocal.ErrSizeMismatch},
		"long":         {t.Context(), strings.NewReader("content and more"), good, 7, ocilocal.ErrSizeMismatch},
		"no digest":    {t.Context(), strings.NewReader("x"), "sha256:x", -1, ocilocal.ErrInvalidDigest},
		"cancelled":    {cancelled, strings.NewReader("content"), good, 7, context.Canceled},
		"failing":      {t.Context(), io.MultiReader(strings.NewReader("con"), iotest.ErrReader(failed)), good, 7, failed},
	} {
		_, err := p.PutBlob(c.ctx, c.src, c.want, c.size)
		if !errors.Is(err, c.err) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := p.StatBlob(t.Context(), good); !errors.Is(err, ocilocal.ErrNotFound) {
			t.Errorf("%s: it is there: %v", what, err)
		}
	}
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
		want := alg.FromString("content")
		for range 2 {
			got, err := p.PutBlob(t.Context(), strings.NewReader("content"), want, -1)
			if err != nil || got.Digest != want || got.Size != 7 {
				t.Errorf("%+v, %v", got, err)
			}
		}
		if text, err := fetched(p, ocispec.Descriptor{Digest: want, Size: 7}); text != "content" || err != nil {
			t.Errorf("%q, %v", text, err)
		}
	}
	if got, err := p.PutBlob(t.Context(), strings.NewReader(""), "", -1); err != nil || got.Digest != digest.FromString("") || got.Size != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	if names := blobNames(t, r); len(names) > 0 {
		t.Errorf("%q are below blobs/", names)
	}
}

// TestPutManifest: a manifest is refused before everything that it needs is there, and published by
// the policy.
func TestPutManifest(t *testing.T) {
	r := openTemp(t, nil)
	p, other := repository(t, r, "localhost/app"), repository(t, r, "localhost/other")
	manifest, config := image("layer")
	desc := manifestOf(manifest)
	put := func(p *ocilocal.Repository, raw string, opts *ocilocal.PutManifestOptions) (ocilocal.RefUpdate, error) {
		return p.PutManifest(t.Context(), manifestOf(raw).MediaType, []byte(raw), opts)
	}
	tagged := &ocilocal.PutManifestOptions{Tag: "v1"}
	_, err := put(p, manifest, tagged)
	mustFail(t, err, ocilocal.ErrIncomplete)
	for _, text := range []string{config, "layer"} {
		if _, err := p.PutBlob(t.Context(), strings.NewReader(text), "", -1); err != nil {
			t.Fatal(err)
		}
	}
	_, err = put(other, manifest, tagged) // what another repository has does not count
	mustFail(t, err, ocilocal.ErrIncomplete)
	_, err = put(p, imageIndexOf(jsonOf(desc)), nil)
	mustFail(t, err, ocilocal.ErrIncomplete)
	_, err = put(p, strings.Replace(manifest, `"size":5`, `"size":6`, 1), nil)
	mustFail(t, err, ocilocal.ErrSizeMismatch)
	_, err = put(p, manifest, &ocilocal.PutManifestOptions{Digest: digest.FromString("x")})
	mustFail(t, err, ocilocal.ErrDigestMismatch)
	_, err = put(p, manifest, &ocilocal.PutManifestOptions{Tag: "-"})
	mustFail(t, err, ocilocal.ErrInvalidReference)
	_, err = put(p, manifest, &ocilocal.PutManifestOptions{PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}})
	mustFail(t, err, ocilocal.ErrInvalidArgument)
	_, err = put(p, "{", nil)
	mustFail(t, err, ocilocal.ErrInvalidManifest)
	checkNoRefs(t, r)

	if u, err := put(p, manifest, tagged); err != nil || u.Outcome != ocilocal.Inserted || u.Descriptor.Digest != desc.Digest {
		t.Errorf("%+v, %v", u, err)
	}
	if u, err := put(p, manifest, tagged); err != nil || u.Outcome != ocilocal.Unchanged {
		t.Errorf("%+v, %v", u, err)
	}
	second, _ := image(config)
	u, err := put(p, second, tagged)
	if mustFail(t, err, ocilocal.ErrConflict); u.Outcome != ocilocal.Conflicted {
		t.Errorf("%+v", u)
	}
	tagged.Policy = ocilocal.Replace
	if u, err := put(p, second, tagged); err != nil || u.Outcome != ocilocal.Replaced || u.Existing != desc.Digest {
		t.Errorf("%+v, %v", u, err)
	}
	long := digest.SHA512.FromString(second)
	if u, err := put(p, second, &ocilocal.PutManifestOptions{Digest: long}); err != nil || u.Descriptor.Digest != long {
		t.Errorf("%+v, %v", u, err)
	}
	if text, err := fetched(p, ocispec.Descriptor{Digest: long, Size: int64(len(second))}); text != second || err != nil {
		t.Errorf("%q, %v", text, err)
	}
}

func checkNoRefs(t *testing.T, r *ocilocal.LocalRegistry) {
	t.Helper()
	if refs, err := refsOf(r); err != nil || len(refs) > 0 {
		t.Errorf("%q, %v", refs, err)
	}
}

// TestMount: a repository gets a blob that another shows.
func TestMount(t *testing.T) {
	r := openTemp(t, nil)
	a, b := repository(t, r, "localhost/a"), repository(t, r, "localhost/b")
	pushImage(t, a, "v1", "layer")
	if _, err := a.PutBlob(t.Context(), strings.NewReader("held"), "", -1); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"layer", "held"} {
		_, err := b.Mount(t.Context(), blobOf(text).Digest, repository(t, r, "localhost/c"))
		mustFail(t, err, ocilocal.ErrNotFound)
		got, err := b.Mount(t.Context(), blobOf(text).Digest, a)
		if err != nil || got.Size != int64(len(text)) {
			t.Errorf("%+v, %v", got, err)
		}
		if got, err := fetched(b, blobOf(text)); got != text || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	}
	if _, err := b.Mount(t.Context(), blobOf("{}").Digest, nil); err != nil {
		t.Error(err)
	}
	_, err := b.Mount(t.Context(), blobOf("absent").Digest, nil)
	mustFail(t, err, ocilocal.ErrNotFound)
	// The bytes stay although no manifest of any repository needs them any more.
	if err := a.Untag(t.Context(), "v1"); err != nil {
		t.Fatal(err)
	}
	manifest, _ := image("layer")
	if err := a.DeleteManifest(t.Context(), manifestOf(manifest).Digest); err != nil {
		t.Fatal(err)
	}
	collect(t, r, atOnce)
	push(t, b, manifest)
}

// TestMountDamaged: a damaged blob cannot be mounted, published or held. A client that mounts it would
// not send the bytes, and its manifest would be refused.
func TestMountDamaged(t *testing.T) {
	r := openTemp(t, nil)
	a, b := repository(t, r, "localhost/a"), repository(t, r, "localhost/b")
	pushImage(t, a, "v1", "layer") // the published file and the held one are the same
	spoil(t, r, blobOf("layer").Digest, "lAyer")
	for _, from := range []*ocilocal.Repository{a, nil} {
		_, err := b.Mount(t.Context(), blobOf("layer").Digest, from)
		mustFail(t, err, ocilocal.ErrNotFound)
	}
	manifest, _ := image("layer")
	push(t, b, manifest, "{}", "layer")
	if _, err := repository(t, r, "localhost/c").Mount(t.Context(), blobOf("layer").Digest, a); err != nil {
		t.Error(err)
	}
}

// expire makes all content too old that repositories hold.
func expire(t *testing.T, r *ocilocal.LocalRegistry) {
	t.Helper()
	execIndex(t, r.Root(), "UPDATE holds SET since = 1")
}

// showsManifests checks which manifests a repository shows.
func showsManifests(t *testing.T, p *ocilocal.Repository, want bool, manifests ...ocispec.Descriptor) {
	t.Helper()
	for _, d := range manifests {
		if _, err := p.StatManifest(t.Context(), d.Digest); (err == nil) != want || err != nil && !errors.Is(err, ocilocal.ErrNotFound) {
			t.Errorf("%s: %v, want it shown: %v", d.Digest, err, want)
		}
	}
}

// TestHeldManifests: collections keep a manifest without a tag until it is too old: one that was
// put by digest, one whose tag was moved, and one whose tag was deleted.
func TestHeldManifests(t *testing.T) {
	_, a, b := twoHandles(t)
	p, other := repository(t, a, "localhost/app"), repository(t, b, "localhost/app")
	byDigest := pushImage(t, p, "", "by digest")
	moved, untagged, put := pushImage(t, p, "moved", "moved"), pushImage(t, p, "untagged", "untagged"), pushImage(t, p, "put", "put")
	expire(t, a) // their first holds, before they were tagged
	if err := p.Tag(t.Context(), byDigest, "moved"); err != nil {
		t.Fatal(err)
	}
	if err := p.Untag(t.Context(), "untagged"); err != nil {
		t.Fatal(err)
	}
	manifest, config := image("instead")
	for _, text := range []string{config, "instead"} {
		if _, err := p.PutBlob(t.Context(), strings.NewReader(text), "", -1); err != nil {
			t.Fatal(err)
		}
	}
	opts := &ocilocal.PutManifestOptions{Tag: "put", PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}}
	if _, err := p.PutManifest(t.Context(), "", []byte(manifest), opts); err != nil {
		t.Fatal(err)
	}
	collect(t, b, atOnce)
	showsManifests(t, other, true, byDigest, moved, untagged, put)
	for text, err := range a.Verify(t.Context(), nil) {
		t.Error(text, err)
	}
	expire(t, a)
	report := collect(t, b, atOnce)
	if report.Deleted.Manifests != 3 || report.Revived > 0 {
		t.Errorf("%+v", report)
	}
	showsManifests(t, other, true, byDigest, manifestOf(manifest))
	showsManifests(t, other, false, moved, untagged, put)
	if err := p.DeleteManifest(t.Context(), byDigest.Digest); err != nil {
		t.Fatal(err)
	}
	if report := collect(t, b, atOnce); report.Deleted.Manifests != 1 {
		t.Errorf("%+v", report)
	}
	mustClose(t, a)
	mustClose(t, b)
	checkCollected(t, b.Root(), model{"localhost/app:put": {""}})
}

// TestHeldReferrers: a referrer that a repository holds stays as long as its subject. It does not
// keep the subject.
func TestHeldReferrers(t *testing.T) {
	r := openTemp(t, nil)
	p := repository(t, r, "localhost/app")
	subject := pushImage(t, p, "v1", "image")
	var referrers []ocispec.Descriptor
	last := subject
	for _, layer := range []string{"signature", "stamp"} {
		manifest, config := image(layer)
		last = push(t, p, referring(manifest, last), config, layer)
		referrers = append(referrers, last)
	}
	expire(t, r)
	collect(t, r, atOnce)
	showsManifests(t, p, true, append(referrers, subject)...)
	if err := p.DeleteManifest(t.Context(), subject.Digest); err != nil {
		t.Fatal(err)
	}
	report := collect(t, r, atOnce)
	if report.Deleted.Manifests != 3 || report.Revived > 0 {
		t.Errorf("%+v", report)
	}
	showsManifests(t, p, false, append(referrers, subject)...)
	mustClose(t, r)
	checkCollected(t, r.Root(), model{})
}

// TestHeldElsewhere: content that one repository deletes is still held by another one.
func TestHeldElsewhere(t *testing.T) {
	r := openTemp(t, nil)
	a, b := repository(t, r, "localhost/a"), repository(t, r, "localhost/b")
	desc := pushImage(t, a, "", "layer")
	pushImage(t, b, "", "layer")
	manifest, config := image("signature")
	signature := push(t, a, referring(manifest, desc), config, "signature")
	push(t, b, referring(manifest, desc), config, "signature")
	for _, d := range []ocispec.Descriptor{signature, desc} {
		if err := a.DeleteManifest(t.Context(), d.Digest); err != nil {
			t.Fatal(err)
		}
	}
	collect(t, r, atOnce)
	showsManifests(t, a, false, desc, signature)
	showsManifests(t, b, true, desc, signature)
}

// TestPutBesideCollector puts content while another handle collects without grace. All acknowledged
// content stays: blobs before their manifest, and manifests without a tag.
func TestPutBesideCollector(t *testing.T) {
	_, a, b := twoHandles(t)
	stop := make(chan struct{})
	collected := make(chan error, 1)
	go func() {
		for {
			if _, err := b.GC(context.Background(), atOnce); err != nil {
				collected <- err
				return
			}
			select {
			case <-stop:
				collected <- nil
				return
			default:
			}
		}
	}()
	var wg sync.WaitGroup
	all := make([]map[string]ocispec.Descriptor, 3)
	for w := range all {
		all[w] = map[string]ocispec.Descriptor{}
		wg.Go(func() {
			p, err := a.Repository(fmt.Sprint("localhost/app", w%2))
			if err != nil {
				t.Error(err)
				return
			}
			for i := range scaled(15, 100, 2000) {
				layer := fmt.Sprintf("layer %d of %d", i, w)
				manifest, config := image(layer)
				for _, text := range []string{config, layer, manifest} {
					d := blobOf(text)
					if text == manifest {
						d = manifestOf(text)
					}
					if err := p.Push(context.Background(), d, strings.NewReader(text)); err != nil {
						t.Errorf("push of %s: %v", text, err)
						return
					}
					all[w][text] = d
				}
				if err := p.Tag(context.Background(), manifestOf(manifest), "latest"); err != nil {
					t.Errorf("tag: %v", err)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	if err := <-collected; err != nil {
		t.Error(err)
	}
	for w := range all {
		p := repository(t, b, fmt.Sprint("localhost/app", w%2))
		for text, d := range all[w] {
			if got, err := fetched(p, d); got != text || err != nil {
				t.Errorf("%q, %v", got, err)
			}
		}
	}
}

// TestPutForeignLayer: a foreign layer may be absent. A manifest that names it does not show the
// content of another repository.
func TestPutForeignLayer(t *testing.T) {
	r := openTemp(t, nil)
	p, other := repository(t, r, "localhost/app"), repository(t, r, "localhost/other")
	manifest, config := image("layer")
	foreign := strings.Replace(manifest, "text/plain", "application/vnd.oci.image.layer.nondistributable.v1.tar", 1)
	desc := push(t, p, foreign, config)
	if _, err := p.StatManifest(t.Context(), desc.Digest); err != nil {
		t.Error(err)
	}
	if ok, err := p.Exists(t.Context(), blobOf("layer")); ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
	secret, _ := image("secret")
	pushImage(t, other, "v1", "secret")
	foreign = strings.Replace(secret, "text/plain", "application/vnd.oci.image.layer.nondistributable.v1.tar", 1)
	_, err := p.PutManifest(t.Context(), "", []byte(foreign), nil)
	mustFail(t, err, ocilocal.ErrIncomplete)
	if ok, err := p.Exists(t.Context(), blobOf("secret")); ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
}
