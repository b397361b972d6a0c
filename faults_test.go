package ocilocal_test

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

const (
	keptRef  = "example.com/fault/kept:v1"
	movedRef = "example.com/fault/moved:v1"
	newRef   = "example.com/fault/new:v1"
)

// keptLayers are the layers of the artifacts that a flow finds.
var keptLayers = [][]byte{[]byte("shared"), noise(30, 3000)}

// A flow is a call on a root that faults and kills interrupt at every file operation. After an
// interruption it can run again.
type flow struct {
	name   string
	seeded bool // the root has keptRef and movedRef, both at the label "before"
	damage bool // and the first of their layers is damaged
	orphan bool // it has artifacts that nothing needs as well, and the flow collects them
	// mirrored: the root is a mirror, which has the manifest of newRef and no blob of it yet
	mirrored bool
	keeps    bool                        // what it keeps of a transfer that failed goes with a collection only
	always   func(op, name string) error // fails these operations in every run
	run      func(r *ocilocal.LocalRegistry) error
	effect   map[string]string // the refs that it moves, with their labels after it; "" removes one
	lacks    string            // operations that it does not use

	beside  func(t *testing.T, dir string) // makes what lies beside the root, in besideOf(root): the source or the target
	exports bool                           // the target then holds keptRef and movedRef as well
}

func publishFlow(ref string, policy ocilocal.Policy, layers ...[]byte) func(*ocilocal.LocalRegistry) error {
	return func(r *ocilocal.LocalRegistry) error {
		_, err := publishLabelled(r, ref, "after", policy, layers...)
		return err
	}
}

// noLinks fails as a file system without hard links does.
func noLinks(op, _ string) error {
	if op == "link" {
		return syscall.EPERM
	}
	return nil
}

// writing are the operations that bring blobs in.
const writing = "create mkdir write chmod fsync link fsyncdir"

var flows = []flow{
	{name: "first open", run: publishFlow(newRef, ocilocal.KeepExisting, noise(31, 2000)),
		effect: map[string]string{newRef: "after"}},
	{name: "first open without links", always: noLinks, run: publishFlow(newRef, ocilocal.KeepExisting, noise(31, 2000)),
		effect: map[string]string{newRef: "after"}},
	{name: "publish new", seeded: true, run: func(r *ocilocal.LocalRegistry) error {
		return publishFlow(newRef, ocilocal.KeepExisting, noise(31, 2000), noise(32, 2<<20))(r)
	},
		effect: map[string]string{newRef: "after"}},
	{name: "publish dedup", seeded: true, run: publishFlow(newRef, ocilocal.KeepExisting, keptLayers...),
		effect: map[string]string{newRef: "after"}},
	{name: "publish without links", seeded: true, always: noLinks, run: publishFlow(newRef, ocilocal.KeepExisting, keptLayers[0], noise(33, 2000)),
		effect: map[string]string{newRef: "after"}},
	{name: "replace and heal", seeded: true, damage: true, run: publishFlow(movedRef, ocilocal.Replace, keptLayers...),
		effect: map[string]string{movedRef: "after"}},
	{name: "tag", seeded: true, run: func(r *ocilocal.LocalRegistry) error {
		ctx := context.Background()
		d, err := r.Resolve(ctx, ocilocal.MustParseReference(keptRef))
		if err != nil {
			return err
		}
		_, err = r.Tag(ctx, d.Digest, ocilocal.MustParseReference(newRef), nil)
		return err
	}, effect: map[string]string{newRef: "before"}, lacks: writing + " remove readdir"},
	{name: "replace", seeded: true, run: publishFlow(movedRef, ocilocal.Replace, noise(31, 2000)),
		effect: map[string]string{movedRef: "after"}},
	{name: "remove", seeded: true, run: func(r *ocilocal.LocalRegistry) error {
		_, err := r.Remove(context.Background(), ocilocal.MustParseReference(movedRef))
		if errors.Is(err, ocilocal.ErrNotFound) { // done again
			err = nil
		}
		return err
	}, effect: map[string]string{movedRef: ""}, lacks: writing + " remove readdir"},
	{name: "gc", seeded: true, orphan: true, run: func(r *ocilocal.LocalRegistry) error {
		opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace, Held: ocilocal.NoGrace}
		ocilocal.StepByOne(opts)
		_, err := r.GC(context.Background(), opts)
		return err
	}, lacks: writing},
	{name: "import archive", seeded: true, run: func(r *ocilocal.LocalRegistry) error {
		_, err := r.ImportArchive(context.Background(), bytes.NewReader(faultArchive()), nil)
		return err
	}, effect: map[string]string{newRef: "imported"}},
	{name: "import layout", seeded: true, beside: writeEntries("", faultEntries(testType)), run: func(r *ocilocal.LocalRegistry) error {
		_, err := r.ImportLayout(context.Background(), besideOf(r.Root()), nil)
		return err
	}, effect: map[string]string{newRef: "imported"}},
	{name: "import legacy", seeded: true, beside: writeEntries(newRefLegacy, faultEntries(ommxType)), run: func(r *ocilocal.LocalRegistry) error {
		report, err := r.ImportLegacy(context.Background(), besideOf(r.Root()), nil)
		for _, f := range report.Failed {
			if report.Imported+report.Verified == 0 { // else what failed was to look further
				err = &ocilocal.Error{Op: "import legacy entry", Err: f.Err}
			}
		}
		return err
	}, effect: map[string]string{newRef: "imported"}},
	{name: "load from legacy", seeded: true, beside: writeEntries(newRefLegacy, faultEntries(ommxType)), run: func(r *ocilocal.LocalRegistry) error {
		ocilocal.SetLegacyRoot(r, besideOf(r.Root()))
		defer ocilocal.SetLegacyRoot(r, "")
		_, err := r.Load(context.Background(), ocilocal.MustParseReference(newRef))
		return err
	}, effect: map[string]string{newRef: "imported"}},
	{name: "pull", seeded: true, keeps: true, run: pullFlow, effect: map[string]string{newRef: "imported"}},
	{name: "pull without links", seeded: true, keeps: true, always: noLinks, run: pullFlow, effect: map[string]string{newRef: "imported"}},
	{name: "put", seeded: true, run: putFlow, effect: map[string]string{newRef: "imported"}},
	{name: "put without links", seeded: true, always: noLinks, run: putFlow, effect: map[string]string{newRef: "imported"}},
	{name: "serve", seeded: true, run: serveFlow, effect: map[string]string{newRef: "imported"}},
	{name: "serve without links", seeded: true, always: noLinks, run: serveFlow, effect: map[string]string{newRef: "imported"}},
	{name: "mirror", seeded: true, mirrored: true, keeps: true, run: mirrorFlow},
	{name: "mirror without links", seeded: true, mirrored: true, keeps: true, always: noLinks, run: mirrorFlow},
	{name: "mirror heals", seeded: true, mirrored: true, damage: true, keeps: true, run: mirrorFlow},
	{name: "mirror heals without links", seeded: true, mirrored: true, damage: true, keeps: true, always: noLinks, run: mirrorFlow},
	{name: "export layout new", seeded: true, exports: true, run: exportLayoutFlow},
	{name: "export layout add", seeded: true, exports: true, beside: othersLayout, run: exportLayoutFlow},
	{name: "export layout add without links", seeded: true, exports: true, always: noLinks, beside: othersLayout, run: exportLayoutFlow},
	{name: "export archive", seeded: true, exports: true, lacks: "mkdir chmod readdir", beside: makeDir, run: exportArchiveFlow},
	{name: "export archive without links", seeded: true, exports: true, lacks: "mkdir chmod readdir", always: noLinks, beside: makeDir, run: exportArchiveFlow},
	{name: "export archive over another", seeded: true, exports: true, lacks: "mkdir chmod readdir link", beside: othersArchive, run: exportArchiveFlow},
}

// faultEntries returns the files of a layout. The root has one of its blobs and lacks another, and
// no manifest needs the third.
func faultEntries(artifactType string) []entry {
	config, layer, shared := "{}", string(noise(34, 5000)), string(keptLayers[0])
	manifest := fmt.Sprintf(`{"schemaVersion":2,"artifactType":%q,"config":%s,"layers":[%s,%s],"annotations":{%q:"imported"}}`,
		artifactType, desc("application/vnd.oci.empty.v1+json", config), desc("a/b", layer), desc("a/b", shared), labelKey)
	return []entry{layoutVersion, layoutIndex(manifest, newRef), blobEntry("unneeded"), blobEntry(layer), blobEntry(shared), blobEntry(config), blobEntry(manifest)}
}

func faultArchive() []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range faultEntries(testType) {
		w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: e.name, Size: int64(len(e.body)), Mode: 0o644})
		w.Write([]byte(e.body))
	}
	w.Close()
	return b.Bytes()
}

var faultLarge = noise(35, 1<<20)

// pullFlow pulls an artifact of which the root has a layer. The transfer of the large layer breaks
// off, and a second request continues it.
func pullFlow(r *ocilocal.LocalRegistry) error {
	_, err := r.Pull(context.Background(), ocilocal.MustParseReference("registry.test/org/model:v1"), &ocilocal.PullOptions{
		As: ocilocal.MustParseReference(newRef), Workers: 1,
		Remote: faultRemote(),
	})
	return err
}

// faultRemote is the client of a registry with an artifact. The transfer of its large layer breaks
// off.
func faultRemote() *ocilocal.Remote {
	config, large, shared := "{}", string(faultLarge), string(keptLayers[0])
	s := &server{host: "registry.test"} // without a registry behind it, which would have files
	for _, b := range []string{config, large, shared} {
		s.plantBlob("org/model", digest.FromString(b), []byte(b))
	}
	s.plant("org/model", "v1", ocispec.MediaTypeImageManifest, fmt.Appendf(nil,
		`{"schemaVersion":2,"artifactType":%q,"config":%s,"layers":[%s,%s],"annotations":{%q:"imported"}}`,
		testType, desc("application/vnd.oci.empty.v1+json", config), desc("a/b", large), desc("a/b", shared), labelKey))
	// Without connections, which would cost descriptors: only files count here.
	registry := roundTripFunc(func(q *http.Request) (*http.Response, error) {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, q)
		res := w.Result()
		if res.ContentLength == int64(len(large)) && q.Header.Get("Range") == "" {
			res.Body = io.NopCloser(io.MultiReader(io.LimitReader(res.Body, 1<<19), iotest.ErrReader(io.ErrUnexpectedEOF)))
		}
		return res, nil
	})
	return &ocilocal.Remote{Retry: quick, Client: &http.Client{Transport: registry}}
}

// mirrorFlow has a client pull the same artifact through a mirror, which has its manifest. The client
// puts the manifest again before it asks for the large blob. Then the mirror fetches that blob, and the
// client does not follow it, so the steps are the same each time.
func mirrorFlow(r *ocilocal.LocalRegistry) error {
	return askMirror(r, "GET manifests/v1", "PUT manifests/v1", "GET blobs/"+string(digest.FromBytes(faultLarge)),
		"GET blobs/"+string(digest.FromString("{}")), "GET blobs/"+string(digest.FromBytes(keptLayers[0])))
}

// askMirror makes requests to the registry as a mirror of that of faultRemote. A PUT has the body of the
// answer before it.
func askMirror(r *ocilocal.LocalRegistry, requests ...string) error {
	var failure error
	ocilocal.SetLogger(r, slog.New(errorLog{slog.DiscardHandler, &failure}))
	defer ocilocal.SetLogger(r, slog.New(slog.DiscardHandler))
	h := r.Handler(&ocilocal.HandlerOptions{Host: "example.com", Upstream: &ocilocal.Upstream{
		Remote: faultRemote(),
		Name:   func(string) (string, error) { return "registry.test/org/model", nil },
	}})
	var last []byte
	for _, request := range requests {
		method, path, _ := strings.Cut(request, " ")
		req := httptest.NewRequest(method, "/v2/fault/new/"+path, bytes.NewReader(last))
		w := httptest.NewRecorder()
		broke := breaksOff(h, w, req)
		if w.Code >= 300 || broke {
			return &ocilocal.Error{Op: fmt.Sprintf("%s: %d, %d bytes", request, w.Code, w.Body.Len()), Err: cmp.Or(failure, errors.New("no whole answer"))}
		}
		last = w.Body.Bytes()
	}
	return nil
}

// breaksOff serves a request and reports whether the answer breaks off in the middle.
func breaksOff(h http.Handler, w http.ResponseWriter, r *http.Request) (broke bool) {
	defer func() {
		switch p := recover(); p {
		case nil:
		case http.ErrAbortHandler:
			broke = true
		default:
			panic(p)
		}
	}()
	h.ServeHTTP(w, r)
	return false
}

// putFlow puts an artifact by its raw content. The root has one of its blobs.
func putFlow(r *ocilocal.LocalRegistry) error {
	ctx := context.Background()
	p, err := r.Repository("example.com/fault/new")
	if err != nil {
		return err
	}
	config, layer, shared := "{}", string(noise(34, 5000)), string(keptLayers[0])
	for _, blob := range []string{config, layer, shared} {
		if _, err := p.PutBlob(ctx, strings.NewReader(blob), "", -1); err != nil {
			return err
		}
	}
	_, err = p.PutManifest(ctx, ocispec.MediaTypeImageManifest, fmt.Appendf(nil,
		`{"schemaVersion":2,"artifactType":%q,"config":%s,"layers":[%s,%s],"annotations":{%q:"imported"}}`,
		testType, desc("application/vnd.oci.empty.v1+json", config), desc("a/b", layer), desc("a/b", shared), labelKey),
		&ocilocal.PutManifestOptions{Tag: "v1"})
	return err
}

// before returns the labels of the refs before the flow.
func (f *flow) before() map[string]string {
	if !f.seeded {
		return map[string]string{}
	}
	labels := map[string]string{keptRef: "before", movedRef: "before"}
	if f.mirrored {
		labels[newRef] = "imported"
	}
	return labels
}

// after returns the labels of the refs after the flow.
func (f *flow) after() map[string]string {
	labels := f.before()
	maps.Copy(labels, f.effect)
	maps.DeleteFunc(labels, func(_, label string) bool { return label == "" })
	return labels
}

// prepare makes a root for the flow.
func (f *flow) prepare(t *testing.T) (root string) {
	t.Helper()
	root = filepath.Join(t.TempDir(), "root")
	if f.beside != nil {
		f.beside(t, besideOf(root))
	}
	if !f.seeded {
		return root
	}
	seed := &flowSeeds[0]
	switch {
	case f.orphan:
		seed = &flowSeeds[1]
	case f.mirrored:
		seed = &flowSeeds[2]
	}
	seed.once.Do(func() {
		made := filepath.Join(t.TempDir(), "root")
		f.seed(t, made)
		seed.read(t, made)
	})
	seed.write(t, root)
	if f.damage {
		rewrite(t, filepath.Join(root, "blobs", "sha256", digest.FromBytes(keptLayers[0]).Encoded()), flipBit)
	}
	return root
}

// seed makes the root that a flow finds, without the damage.
func (f *flow) seed(t *testing.T, root string) {
	t.Helper()
	r := mustOpen(t, root)
	for ref, label := range f.before() {
		if ref == newRef { // not published: see below
			continue
		}
		if _, err := publishLabelled(r, ref, label, ocilocal.KeepExisting, keptLayers...); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		if !f.orphan {
			break
		}
		if _, err := publishLabelled(r, newRef, "orphan", ocilocal.KeepExisting, noise(byte(60+i), 3000), []byte("of all three"), keptLayers[0]); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Remove(t.Context(), ocilocal.MustParseReference(newRef)); err != nil {
			t.Fatal(err)
		}
	}
	if f.orphan { // and what a repository holds: a manifest, its referrer, and blobs
		p := repository(t, r, "example.com/fault/held")
		held := pushImage(t, p, "", "held")
		manifest, config := image("held, too")
		push(t, p, referring(manifest, held), config, "held, too")
	}
	if f.mirrored {
		if err := askMirror(r, "GET manifests/v1"); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, r)
}

// flowSeeds are the roots that flows find: without orphans, with them, and of a mirror. Each is made
// once, since flows need thousands of copies.
var flowSeeds [3]struct {
	once sync.Once
	savedRoot
}

// A savedRoot is a closed registry in memory.
type savedRoot []savedFile

type savedFile struct {
	name string // below the root, "." for the root
	mode fs.FileMode
	body []byte
}

func (s *savedRoot) read(t *testing.T, root string) {
	t.Helper()
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		f := savedFile{name: rel, mode: fi.Mode()}
		if !fi.IsDir() {
			f.body, err = os.ReadFile(p)
		}
		*s = append(*s, f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// write makes a copy of the registry.
func (s savedRoot) write(t *testing.T, root string) {
	t.Helper()
	for _, f := range s {
		var err error
		if name := filepath.Join(root, f.name); f.mode.IsDir() {
			err = os.Mkdir(name, f.mode.Perm())
		} else {
			err = os.WriteFile(name, f.body, f.mode.Perm())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// labels reads the refs of all flows. The flow itself may have damaged a layer.
func (f *flow) labels(t *testing.T, r *ocilocal.LocalRegistry) map[string]string {
	t.Helper()
	got := map[string]string{}
	for _, ref := range []string{keptRef, movedRef, newRef} {
		label, err := readLabelled(r, ref)
		if f.damage && errors.Is(err, ocilocal.ErrDigestMismatch) {
			label, err = f.before()[ref], nil
		}
		if f.mirrored && ref == newRef && errors.Is(err, ocilocal.ErrAbsent) {
			label, err = "imported", nil
		}
		if errors.Is(err, ocilocal.ErrNotFound) && !errors.Is(err, ocilocal.ErrIncomplete) {
			if ok, err := r.Exists(t.Context(), ocilocal.MustParseReference(ref)); ok || err != nil {
				t.Errorf("%s resolves (%v), and can't be read", ref, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", ref, err)
		}
		got[ref] = label
	}
	return got
}

// exactly is the model of a root with these labels.
func exactly(labels map[string]string) model {
	m := model{}
	for ref, label := range labels {
		m[ref] = []string{label}
	}
	return m
}

// A fault fails one file operation with an errno.
type fault struct {
	pointSeam
	errno error
}

// newFault returns a fault of the flow on root.
func (f *flow) newFault(root string, at point, errno error) *fault {
	if errno == io.ErrShortWrite && at.op != "write" {
		errno = syscall.EIO
	}
	fa := &fault{errno: errno}
	fa.base, fa.at, fa.always = filepath.Dir(root), at, f.always
	fa.act = func() error { return errno }
	return fa
}

var faultErrors = []error{
	syscall.EIO, syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.EACCES, syscall.EROFS,
	syscall.EXDEV, syscall.EPERM, syscall.EMLINK, syscall.EINTR, io.ErrShortWrite,
}

// TestFaultAtEveryOperation fails each file operation of each flow in turn, from opening to
// closing. A flow that reports success has done everything. A flow that fails has changed nothing,
// and its error has a type. When the operation works again, the same handle completes the flow. The
// quick run fails every 15th operation. The full run fails each with every errno, the others with
// one.
func TestFaultAtEveryOperation(t *testing.T) {
	for i := range flows {
		f := &flows[i]
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			all := f.points(t)
			seen := map[string]int{}
			for _, p := range all {
				seen[p.op]++
			}
			for _, op := range []string{"open", "create", "mkdir", "write", "chmod", "fsync", "link", "fsyncdir", "remove", "stat", "readdir"} {
				if seen[op] == 0 && !strings.Contains(f.lacks, op) {
					t.Errorf("no %s is recorded: the seam or this test misses it (seen: %v)", op, seen)
				}
			}
			points := everyNth(all, scaled(15, 1, 1))
			for n, p := range points {
				for e := range scaled(1, 1, len(faultErrors)) {
					if errno := faultErrors[(n+4*e+i)%len(faultErrors)]; !f.withFault(t, p, errno) {
						t.Errorf("this recorded operation was not reached")
					} else if !t.Failed() {
						continue
					}
					t.Fatalf("with a fault at %v", p)
				}
			}
			t.Logf("%d of %d points: %v", len(points), len(all), seen)
			f.withFault(t, point{}, nil)
		})
	}
}

// withFault runs the flow on a new root, and fails one operation. It reports whether the flow
// reached that operation.
func (f *flow) withFault(t *testing.T, at point, errno error) (hit bool) {
	t.Helper()
	root := f.prepare(t)
	fa := f.newFault(root, at, errno)
	r, err := ocilocal.OpenFaulty(t.Context(), root, fa.fault)
	if err == nil {
		if err = f.run(r); err == nil && !fa.hit.Load() {
			err = r.Close() // which may be hit as well
			r = nil
			if fa.hit.Load() && err != nil {
				checkFault(t, err, fa)
				err = nil
			}
		}
	}
	hit = fa.hit.Load()
	op := strings.TrimSpace(at.op + " " + at.name)
	f.checkBeside(t, root, err == nil, op)
	want := f.after()
	if err != nil {
		checkFault(t, err, fa)
		want = f.before()
	}
	if r != nil {
		ocilocal.SetFault(r, f.always)
	} else if r, err = ocilocal.OpenFaulty(t.Context(), root, f.always); err != nil {
		t.Fatalf("open after a fault: %v", err)
	}
	defer r.Close()
	if got := f.labels(t, r); !maps.Equal(got, want) {
		t.Errorf("after a fault (%v): %v, want %v", err, got, want)
	}
	if err := f.run(r); err != nil {
		t.Errorf("the same once the cause is over: %v", err)
	}
	f.checkBeside(t, root, true, op)
	mustClose(t, r)
	if hit { // the next writer sweeps files that could not be removed
		r = mustOpen(t, root)
		if err := f.run(r); err != nil {
			t.Error(err)
		}
		f.sweep(t, r)
		mustClose(t, r)
	}
	f.check(t, root)
	return hit
}

// check checks a root after the flow.
func (f *flow) check(t *testing.T, root string) {
	t.Helper()
	if f.orphan || f.keeps {
		checkCollected(t, root, exactly(f.after()))
	} else {
		checkStore(t, root, exactly(f.after()))
	}
}

// sweep stages a blob and drops it, because not every flow writes.
func (f *flow) sweep(t *testing.T, r *ocilocal.LocalRegistry) {
	t.Helper()
	if f.keeps {
		collect(t, r, atOnce)
		return
	}
	b, err := r.NewBuilder(ocilocal.MustParseReference(newRef), &ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.AddLayerBytes(t.Context(), "text/plain", []byte("dropped"), nil); err != nil {
		t.Error(err)
	}
	if err := b.Cancel(); err != nil {
		t.Error(err)
	}
}

func checkFault(t *testing.T, err error, fa *fault) {
	t.Helper()
	errno := fa.errno
	if _, ok := errors.AsType[*ocilocal.Error](err); !ok || !errors.Is(err, errno) {
		t.Errorf("error %T %v is not typed, or not %v", err, err, errno)
	}
	want := map[error]error{syscall.ENOSPC: ocilocal.ErrNoSpace, syscall.EDQUOT: ocilocal.ErrNoSpace, syscall.EROFS: ocilocal.ErrReadOnly}[errno]
	if want != nil && !errors.Is(err, want) {
		t.Errorf("error %v is not %v", err, want)
	}
}
