package ocilocal_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// A lacking layout has an artifact without one of its parts: a member of an image index, or a
// foreign layer.
type lacking struct {
	top     string // the manifest or image index
	parts   []entry
	missing []entry // in whole, those that parts leave out
	absent  digest.Digest
}

const lackingName = "example.com/a:v1"

func (l *lacking) entries(more ...entry) []entry {
	index := indexOf(called(desc(l.mediaType(), l.top), refName, lackingName))
	return append(append([]entry{blobEntry(l.top), index}, l.parts...), more...)
}

func (l *lacking) mediaType() string {
	if strings.Contains(l.top, `"manifests"`) {
		return ocispec.MediaTypeImageIndex
	}
	return imageType
}

func lackingLayouts() map[string]*lacking {
	first, config := image("layer")
	second, _ := image("LAYER")
	amd64 := with(desc(imageType, first), `"platform":{"os":"linux","architecture":"amd64"}`)
	arm64 := with(desc(imageType, second), `"platform":{"os":"linux","architecture":"arm64"}`)
	member := []entry{blobEntry(config), blobEntry("LAYER"), blobEntry(second)}
	other := []entry{blobEntry(first), blobEntry("layer")}
	nested := imageIndexOf(amd64)
	foreign := func(mediaType string) *lacking {
		m := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s,%s]}`, imageType, desc("application/vnd.example.config", config),
			desc("text/plain", "LAYER"), with(desc(mediaType, "foreign"), `"urls":["https://example.com/foreign"]`))
		return &lacking{top: m, parts: []entry{blobEntry(config), blobEntry("LAYER")}, missing: []entry{blobEntry("foreign")}, absent: digest.FromString("foreign")}
	}
	return map[string]*lacking{
		"sparse index":   {top: imageIndexOf(amd64, arm64), parts: member, missing: other, absent: digest.FromString(first)},
		"nested index":   {top: imageIndexOf(arm64, desc(ocispec.MediaTypeImageIndex, nested)), parts: append(member, blobEntry(nested)), missing: other, absent: digest.FromString(first)},
		"index alone":    {top: imageIndexOf(amd64), missing: append(other, blobEntry(config)), absent: digest.FromString(first)},
		"OCI foreign":    foreign("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
		"Docker foreign": foreign("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
	}
}

// TestAbsentMembers uses artifacts with an absent part in every operation. Then it adds the part.
func TestAbsentMembers(t *testing.T) {
	t.Parallel()
	for name, l := range lackingLayouts() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			r, got, err := importBoth(t, nil, l.entries()...)
			if err != nil {
				t.Fatal(err)
			}
			root := digest.FromString(l.top)
			if len(got.Absent) != 1 || got.Absent[0].Digest != l.absent || got.Artifacts[0].Descriptor.Digest != root {
				t.Fatalf("%+v", got)
			}
			checkAbsent(t, r, l.absent)
			if _, err := r.Tag(ctx, root, ref("example.com/a:v2"), nil); err != nil {
				t.Error(err)
			}
			if report := collect(t, r, atOnce); report.Deleted.Blobs+report.Deleted.Manifests != 0 {
				t.Errorf("collected: %+v", report)
			}
			if report, err := r.Repair(ctx, nil); err != nil || len(report.Left)+len(report.Rewritten)+len(report.Recorded) != 0 {
				t.Errorf("repair: %+v, %v", report, err)
			}
			if _, err := r.RefUsage(ctx, ref(lackingName)); err != nil {
				t.Error(err)
			}

			// It is exported without the part, and can be imported again.
			dir := t.TempDir()
			var archive bytes.Buffer
			if err := errors.Join(r.ExportLayout(ctx, dir, []ocilocal.Reference{ref(lackingName)}, nil), r.ExportArchive(ctx, &archive, []ocilocal.Reference{ref(lackingName)}, nil)); err != nil {
				t.Fatal(err)
			}
			again := openTemp(t, nil)
			if got, err := again.ImportArchive(ctx, &archive, nil); err != nil || len(got.Absent) != 1 {
				t.Errorf("from the exported archive: %+v, %v", got, err)
			}
			if got, err := again.ImportLayout(ctx, dir, nil); err != nil || len(got.Absent) != 1 || got.Artifacts[0].Update.Outcome != ocilocal.Unchanged {
				t.Errorf("from the exported layout: %+v, %v", got, err)
			}
			backup := filepath.Join(t.TempDir(), "backup")
			if report, err := r.Backup(ctx, backup, nil); err != nil || len(report.Failed) != 0 {
				t.Fatalf("backup: %+v, %v", report, err)
			}
			backedUp := mustOpen(t, backup)
			checkAbsent(t, backedUp, l.absent)
			checkSound(t, backedUp)
			mustClose(t, backedUp)
			copied := openTemp(t, nil)
			if got, err := copied.ImportRegistry(ctx, r, ref(lackingName), nil); err != nil || len(got.Absent) != 1 {
				t.Errorf("from the registry: %+v, %v", got, err)
			}
			checkAbsent(t, copied, l.absent)

			// An import of the whole artifact adds the part.
			whole, err := r.ImportLayout(ctx, layoutDir(t, l.entries(l.missing...)...), nil)
			if err != nil || len(whole.Absent) != 0 || whole.Artifacts[0].Update.Outcome != ocilocal.Unchanged {
				t.Fatalf("the whole artifact: %+v, %v", whole, err)
			}
			if _, err := r.HasBlob(ctx, l.absent); err != nil {
				t.Error(err)
			}
			collect(t, r, atOnce)
			checkSound(t, r)
			// A source without the part does not remove it.
			if got, err := r.ImportLayout(ctx, layoutDir(t, l.entries()...), nil); err != nil || len(got.Absent) != 0 {
				t.Errorf("the part again: %+v, %v", got, err)
			}
			checkSound(t, r)
			for _, name := range []string{"example.com/a:v1", "example.com/a:v2"} {
				for _, r := range []*ocilocal.LocalRegistry{r, again} {
					if _, err := r.Remove(ctx, ref(name)); err != nil && !errors.Is(err, ocilocal.ErrNotFound) {
						t.Error(err)
					}
				}
			}
			for _, r := range []*ocilocal.LocalRegistry{r, again} {
				collect(t, r, atOnce)
				if names := blobNames(t, r); len(names) != 0 {
					t.Errorf("left: %v", names)
				}
				checkSound(t, r)
			}
		})
	}
}

// TestRemoteAbsentMembers pushes artifacts with an absent part to a registry that accepts them and
// to one that does not. It pulls them before and after the registry has the part.
func TestRemoteAbsentMembers(t *testing.T) {
	t.Parallel()
	for name, l := range lackingLayouts() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			strict, s := newServer(t), newServer(t)
			s.sparse = true
			r := openRemote(t, nil)
			if _, err := r.ImportLayout(ctx, layoutDir(t, l.entries()...), nil); err != nil {
				t.Fatal(err)
			}
			// A registry that wants all members takes a manifest without its foreign layer.
			foreign := l.mediaType() == imageType
			if _, err := r.Push(ctx, ref(lackingName), &ocilocal.PushOptions{As: strict.ref("a:v1")}); (err == nil) != foreign {
				t.Errorf("a push to a registry that wants all members: %v", err)
			}
			at := s.ref("a:v1")
			if _, err := r.Push(ctx, ref(lackingName), &ocilocal.PushOptions{As: at}); err != nil {
				t.Fatal(err)
			}
			if asked := s.requests(l.absent.String()); len(asked) != 0 {
				t.Errorf("asked for what is absent here: %v", asked)
			}

			fresh := openRemote(t, nil)
			got, err := fresh.Pull(ctx, at, nil)
			switch {
			case foreign && (err != nil || len(got.Absent) != 1):
				t.Errorf("a foreign layer that is not there: %+v, %v", got, err)
			case !foreign && !errors.Is(err, ocilocal.ErrIncomplete):
				t.Errorf("a member that is not there: %+v, %v", got, err)
			}
			if foreign {
				checkAbsent(t, fresh, l.absent)
				checkSound(t, fresh)
			}
			// A part that is absent here already may be absent there.
			if got, err := r.Pull(ctx, at, nil); err != nil || got.Update.Reference != at || !foreign && len(got.Absent) != 1 {
				t.Errorf("what is absent here too: %+v, %v", got, err)
			}
			if _, err := r.LoadWith(ctx, at, nil); err != nil {
				t.Errorf("load: %v", err)
			}
			checkSound(t, r)

			whole := openRemote(t, nil)
			if _, err := whole.ImportLayout(ctx, layoutDir(t, l.entries(l.missing...)...), nil); err != nil {
				t.Fatal(err)
			}
			if _, err := whole.Push(ctx, ref(lackingName), &ocilocal.PushOptions{As: at}); err != nil {
				t.Fatal(err)
			}
			if !foreign {
				if got, err := r.Pull(ctx, at, nil); err != nil || len(got.Absent) != 0 || got.Update.Outcome != ocilocal.Unchanged {
					t.Errorf("now that it is there: %+v, %v", got, err)
				}
				if _, err := r.HasBlob(ctx, l.absent); err != nil {
					t.Error(err)
				}
			}
			if got, err := openRemote(t, nil).Pull(ctx, at, nil); err != nil || len(got.Absent) != 0 {
				t.Errorf("whole: %+v, %v", got, err)
			}
			checkSound(t, r)
		})
	}
}

// checkAbsent checks that a read of absent content fails with an error that says so.
func checkAbsent(t *testing.T, r *ocilocal.LocalRegistry, d digest.Digest) {
	t.Helper()
	_, hasErr := r.HasBlob(t.Context(), d)
	_, openErr := r.OpenBlob(t.Context(), ocispec.Descriptor{Digest: d, Size: -1})
	_, fileErr := r.OpenBlobFile(t.Context(), ocispec.Descriptor{Digest: d, Size: -1})
	_, loadErr := r.LoadDigest(t.Context(), d)
	for _, err := range []error{hasErr, openErr, fileErr, loadErr} {
		if !errors.Is(err, ocilocal.ErrAbsent) || !errors.Is(err, ocilocal.ErrNotFound) {
			t.Errorf("of absent content: %v", err)
		}
	}
}

// TestAbsentOnly: only a member of an image index and a foreign layer may be absent. Any other
// missing blob stops the import. So does a member that another registry has lost.
func TestAbsentOnly(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	sparse := imageIndexOf(desc(imageType, manifest))
	for name, parts := range map[string][]entry{
		"a layer of a member":       {blobEntry(sparse), blobEntry(manifest), blobEntry(config), indexOf(desc(ocispec.MediaTypeImageIndex, sparse))},
		"a config":                  {blobEntry(manifest), blobEntry("layer"), indexOf(desc(imageType, manifest))},
		"the entry":                 {blobEntry(config), indexOf(desc(imageType, manifest))},
		"the entry, an image index": {blobEntry(config), indexOf(desc(ocispec.MediaTypeImageIndex, sparse))},
	} {
		if _, got, err := importBoth(t, nil, parts...); !errors.Is(err, ocilocal.ErrIncomplete) {
			t.Errorf("without %s: %+v, %v", name, got, err)
		}
	}
	lost, whole := openTemp(t, nil), lackingLayouts()["sparse index"]
	if _, err := lost.ImportLayout(t.Context(), layoutDir(t, whole.entries(whole.missing...)...), nil); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(blobFile(lost, whole.absent)); err != nil {
		t.Fatal(err)
	}
	dontWatch(lost.Root())
	if got, err := openTemp(t, nil).ImportRegistry(t.Context(), lost, ref(lackingName), nil); !errors.Is(err, ocilocal.ErrIncomplete) {
		t.Errorf("of a registry that has lost a member: %+v, %v", got, err)
	}
}

// TestAbsentElsewhereNeeded: content may be absent for one artifact. For another one that needs it,
// it is missing, even in the same import.
func TestAbsentElsewhereNeeded(t *testing.T) {
	t.Parallel()
	l := lackingLayouts()["OCI foreign"]
	needs, _ := image("foreign")
	both := append(l.entries(blobEntry(needs))[2:], blobEntry(l.top),
		indexOf(called(desc(imageType, l.top), refName, lackingName), called(desc(imageType, needs), refName, "example.com/needs:v1")))
	if _, got, err := importBoth(t, nil, both...); !errors.Is(err, ocilocal.ErrIncomplete) {
		t.Errorf("together: %+v, %v", got, err)
	}
	r, _, err := importBoth(t, nil, l.entries()...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.ImportLayout(t.Context(), layoutDir(t, blobEntry(needs), blobEntry("{}"), indexOf(desc(imageType, needs))), nil); !errors.Is(err, ocilocal.ErrIncomplete) {
		t.Errorf("afterwards: %v", err)
	}
	b, err := r.NewBuilder(ref("example.com/built:v1"), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.test"})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	if _, err := b.AddLayerBytes(t.Context(), "text/plain", []byte("foreign"), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.HasBlob(t.Context(), l.absent); err != nil {
		t.Errorf("after a build of it: %v", err)
	}
	collect(t, r, atOnce)
	checkSound(t, r)
}

// TestAbsentAfterKilledCollector: a collector that was killed after it had deleted a file leaves a
// row that says the member is here. An import that records the member as absent goes by the file.
func TestAbsentAfterKilledCollector(t *testing.T) {
	t.Parallel()
	l := lackingLayouts()["sparse index"]
	r := openTemp(t, nil)
	if _, err := r.ImportLayout(t.Context(), layoutDir(t, l.entries(l.missing...)...), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Remove(t.Context(), ref(lackingName)); err != nil {
		t.Fatal(err)
	}
	for _, name := range blobNames(t, r) {
		if err := os.Remove(blobFile(r, name)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := r.ImportLayout(t.Context(), layoutDir(t, l.entries()...), nil); err != nil || len(got.Absent) != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	checkAbsent(t, r, l.absent)
	collect(t, r, atOnce)
	checkSound(t, r)
}

// TestRebuildAbsent: after a Rebuild of a damaged index, absent members are still recorded as
// absent, and collections can delete.
func TestRebuildAbsent(t *testing.T) {
	t.Parallel()
	for name, l := range lackingLayouts() {
		root := filepath.Join(t.TempDir(), "root")
		r := mustOpen(t, root)
		if _, err := r.ImportLayout(t.Context(), layoutDir(t, l.entries()...), nil); err != nil {
			t.Fatal(err)
		}
		mustClose(t, r)
		dontWatch(root)
		execIndex(t, root, "CREATE TRIGGER x AFTER INSERT ON refs BEGIN DELETE FROM refs; END")
		report, err := ocilocal.Rebuild(t.Context(), root, nil)
		if err != nil || len(report.Left) != 0 || len(report.Recovered) != 1 || report.Recovered[0].Reference != ref(lackingName) {
			t.Errorf("%s: %+v, %v", name, report, err)
			continue
		}
		r = mustOpen(t, root)
		checkAbsent(t, r, l.absent)
		collect(t, r, atOnce)
		checkSound(t, r)
		mustClose(t, r)
	}
}

// TestDescriptorData imports artifacts without the files of some blobs. The descriptors carry their
// bytes.
func TestDescriptorData(t *testing.T) {
	t.Parallel()
	data := `"data":"` // base64 below
	m := fmt.Sprintf(`{"schemaVersion":2,"artifactType":"application/vnd.example.test","config":%s,"layers":[%s]}`,
		with(desc("application/vnd.oci.empty.v1+json", "{}"), data+`e30="`), with(desc("text/plain", "layer"), data+`bGF5ZXI="`))
	r, got, err := importBoth(t, nil, blobEntry(m), indexOf(called(desc(imageType, m), refName, lackingName)))
	if err != nil || got.BlobsWritten != 3 || len(got.Absent) != 0 {
		t.Fatalf("%+v, %v", got, err)
	}
	for _, s := range []string{"{}", "layer"} {
		if size, err := r.HasBlob(t.Context(), digest.FromString(s)); err != nil || size != int64(len(s)) {
			t.Errorf("%s: %d, %v", s, size, err)
		}
	}
	// Image indexes carry an image, and a referrer of it. An import that looks into them reads the data.
	withData := func(mediaType, body string) string {
		return with(desc(mediaType, body), data+base64.StdEncoding.EncodeToString([]byte(body))+`"`)
	}
	member := with(withData(imageType, m), `"platform":{"os":"linux","architecture":"arm64"}`)
	inner := imageIndexOf(member)
	outer := imageIndexOf(withData(ocispec.MediaTypeImageIndex, inner))
	signature := strings.Replace(m, `"config"`, `"subject":`+desc(imageType, m)+`,"config"`, 1)
	index := indexOf(called(withData(ocispec.MediaTypeImageIndex, inner), refName, lackingName),
		withData(ocispec.MediaTypeImageIndex, outer), withData(imageType, signature))
	for _, opts := range []*ocilocal.ImportOptions{
		{Select: lackingName, Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64"}, Referrers: true},
		{Select: digest.FromString(m).String(), Referrers: true},
	} {
		_, got, err := importBoth(t, opts, index)
		if err != nil || len(got.Artifacts) != 1 || got.Artifacts[0].Descriptor.Digest != digest.FromString(m) || len(got.Referrers) != 1 {
			t.Errorf("%+v: %+v, %v", opts, got, err)
		}
	}
	bad := strings.Replace(m, "bGF5ZXI=", "TEFZRVI=", 1)
	if _, _, err := importBoth(t, nil, blobEntry(bad), indexOf(desc(imageType, bad))); !errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Errorf("data of other content: %v", err)
	}
}

// TestAbsentMemberAsLayer: the bytes of an absent member of an image index are here as a layer of
// another artifact. They are a blob, which says nothing about what the member needs.
func TestAbsentMemberAsLayer(t *testing.T) {
	t.Parallel()
	for name, l := range lackingLayouts() {
		if l.mediaType() != ocispec.MediaTypeImageIndex {
			continue
		}
		for _, before := range []bool{false, true} {
			t.Run(fmt.Sprint(name, before), func(t *testing.T) {
				t.Parallel()
				ctx := t.Context()
				root := filepath.Join(t.TempDir(), "root")
				r := mustOpen(t, root)
				bytes, _ := image("layer")
				if before {
					pushImage(t, repository(t, r, "localhost/app"), "v1", bytes)
				}
				for range 2 {
					if got, err := r.ImportLayout(ctx, layoutDir(t, l.entries()...), nil); err != nil || len(got.Absent) != 1 {
						t.Fatalf("%+v, %v", got, err)
					}
					if !before {
						pushImage(t, repository(t, r, "localhost/app"), "v1", bytes)
					}
				}
				check := func(t *testing.T, r *ocilocal.LocalRegistry) {
					t.Helper()
					collect(t, r, atOnce)
					checkSound(t, r)
					if _, err := r.HasBlob(ctx, l.absent); err != nil {
						t.Error(err)
					}
					if _, err := r.LoadDigest(ctx, l.absent); !errors.Is(err, ocilocal.ErrAbsent) {
						t.Error(err)
					}
				}
				check(t, r)
				if report, err := r.Repair(ctx, nil); err != nil || len(report.Left)+len(report.Rewritten)+len(report.Recorded) != 0 {
					t.Errorf("repair: %+v, %v", report, err)
				}
				if err := r.ExportLayout(ctx, t.TempDir(), []ocilocal.Reference{ref(lackingName)}, nil); err != nil {
					t.Error(err)
				}
				copied := openTemp(t, nil)
				if got, err := copied.ImportRegistry(ctx, r, ref(lackingName), nil); err != nil || len(got.Absent) != 1 {
					t.Errorf("%+v, %v", got, err)
				}
				checkAbsent(t, copied, l.absent)
				backup := filepath.Join(t.TempDir(), "backup")
				if report, err := r.Backup(ctx, backup, nil); err != nil || len(report.Failed) != 0 {
					t.Fatalf("backup: %+v, %v", report, err)
				}
				check(t, mustOpen(t, backup))

				mustClose(t, r)
				dontWatch(root)
				execIndex(t, root, "CREATE TRIGGER x AFTER INSERT ON refs BEGIN DELETE FROM refs; END")
				if report, err := ocilocal.Rebuild(ctx, root, nil); err != nil || len(report.Left) != 0 || len(report.Recovered) != 2 {
					t.Fatalf("%+v, %v", report, err)
				}
				r = mustOpen(t, root)
				check(t, r)

				// The member comes as a manifest, and then is one, here and in a backup.
				if got, err := r.ImportLayout(ctx, layoutDir(t, l.entries(l.missing...)...), nil); err != nil || len(got.Absent) != 0 {
					t.Fatalf("%+v, %v", got, err)
				}
				if report, err := r.Backup(ctx, backup, nil); err != nil || len(report.Failed) != 0 {
					t.Fatalf("backup: %+v, %v", report, err)
				}
				for _, r := range []*ocilocal.LocalRegistry{r, mustOpen(t, backup)} {
					collect(t, r, atOnce)
					checkSound(t, r)
					if _, err := r.LoadDigest(ctx, l.absent); err != nil {
						t.Error(err)
					}
				}
				// If its row is lost now, that is damage.
				execIndex(t, root, "DELETE FROM members WHERE manifest = "+sqlID(l.absent)+"; DELETE FROM manifests WHERE id = "+sqlID(l.absent))
				if _, err := r.GC(ctx, atOnce); !errors.Is(err, ocilocal.ErrUnsafe) {
					t.Error(err)
				}
			})
		}
	}
}
