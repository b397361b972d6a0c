package powercut

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

var (
	cuts    = flag.Int("cuts", 40, "how many moments to cut the power at")
	seed    = flag.Uint64("seed", 1, "of the moments and of what the disk keeps")
	writers = flag.Int("writers", 2, "how many goroutines change the registry")
	changes = flag.Int("changes", 300, "how many changes each makes")
	require = flag.Bool("require", false, "fail where power cuts can't be simulated, instead of skipping")
)

const diskSize = 96 << 20

// diskEnv is set in the process that serves a disk.
const diskEnv = "OCILOCAL_POWERCUT_DISK"

func TestMain(m *testing.M) {
	if os.Getenv(diskEnv) != "" {
		serveDisk()
		return
	}
	m.Run()
}

// machine is a disk, and the directory where ext4 on it is mounted.
type machine struct {
	t    *testing.T
	disk *diskProcess
	dir  string
	off  func() // unmounts the ext4; idempotent
}

// mark returns the present moment. It may be called on any goroutine.
func (m *machine) mark() int {
	n, err := m.disk.mark()
	if err != nil {
		m.t.Error(err)
	}
	return n
}

// boot makes a new disk with an empty ext4 on it and mounts it.
func boot(t *testing.T) *machine {
	t.Helper()
	unavailable := func(what string, err error) {
		t.Helper()
		if *require {
			t.Fatalf("power cuts can't be simulated here: %s: %v", what, err)
		}
		t.Skipf("SKIPPED power cuts: %s: %v", what, err)
	}
	if os.Geteuid() != 0 {
		unavailable("mounting", errors.New("needs root"))
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, diskSize); err != nil {
		t.Fatal(err)
	}
	if err := run("mkfs.ext4", "-q", "-F", image); err != nil {
		unavailable("mkfs.ext4", err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	outer := t.TempDir()
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), diskEnv+"=1")
	d, err := startDisk(cmd, image, outer)
	if err != nil {
		unavailable("FUSE", err)
	}
	t.Cleanup(func() {
		if err := d.stop(); err != nil {
			t.Error(err)
		}
	})
	dir := t.TempDir()
	umount, err := mount(filepath.Join(outer, "disk"), dir)
	if err != nil {
		unavailable("loop device", err)
	}
	off := sync.OnceFunc(func() {
		if err := umount(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(off)
	return &machine{t, d, dir, off}
}

// mount mounts the ext4 in the file image at dir.
func mount(image, dir string) (umount func() error, err error) {
	loop, err := exec.Command("losetup", "-f", "--show", image).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("losetup: %w: %s", err, loop)
	}
	dev := strings.TrimSpace(string(loop))
	if err := run("mount", "-t", "ext4", dev, dir); err != nil {
		return nil, errors.Join(err, run("losetup", "-d", dev))
	}
	return func() error { return errors.Join(run("umount", dir), run("losetup", "-d", dev)) }, nil
}

func run(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}

// eachCut mounts the disks that power cuts at random moments leave, and calls check for each.
func (m *machine) eachCut(t *testing.T, first int, check func(t *testing.T, dir string, moment int)) {
	m.off()
	rng := rand.New(rand.NewPCG(*seed, 0))
	last := m.mark()
	t.Logf("%d writes and flushes, %d cuts", last-first, *cuts)
	image := filepath.Join(t.TempDir(), "image")
	for i := range *cuts {
		moment := first + rng.IntN(last-first+1)
		if err := m.disk.cut(moment, rng.Uint64(), image); err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(t.TempDir(), "m")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		umount, err := mount(image, dir)
		if err != nil {
			t.Fatal(err)
		}
		check(t, dir, moment)
		if err := umount(); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			t.Fatalf("cut %d at moment %d of %d..%d, seed %d", i, moment, first, last, *seed)
		}
	}
}

// A change is one acknowledged or attempted change of one ref.
type change struct {
	begun, done int           // moments
	digest      digest.Digest // what the ref then points at; "" for none
}

// A history is the changes of one ref in their order, made one after the other.
type history []change

// at returns what the ref may point at when the power is cut at a moment.
func (h history) at(moment int) (may []digest.Digest) {
	may = []digest.Digest{""}
	for _, c := range h {
		switch {
		case c.done <= moment:
			may = []digest.Digest{c.digest}
		case c.begun <= moment:
			may = append(may, c.digest)
		}
	}
	return may
}

// TestPowerCuts cuts the power while several goroutines build, replace, tag,
// remove and import. What was acknowledged must be there, whole, and nothing
// that was not attempted.
func TestPowerCuts(t *testing.T) {
	m := boot(t)
	ctx := t.Context()
	// The registry's directory is there before anything is cut; what Open makes is not.
	first := m.mark()
	root := filepath.Join(m.dir, "registry")
	reg, err := ocilocal.Open(ctx, root, nil)
	if err != nil {
		t.Fatal(err)
	}
	archive := exported(t)
	var mu sync.Mutex
	histories := map[string]history{}
	var wg sync.WaitGroup
	for g := range *writers {
		wg.Go(func() {
			w := &worker{ctx: ctx, reg: reg, mark: m.mark, rng: rand.New(rand.NewPCG(*seed, uint64(g+1))), histories: map[string]history{}}
			for i := range *changes {
				if err := w.step(g, i, archive); err != nil {
					t.Error(err)
					return
				}
			}
			mu.Lock()
			defer mu.Unlock()
			for ref, h := range w.histories {
				histories[ref] = h
			}
		})
	}
	wg.Wait()
	if err := reg.Close(); err != nil {
		t.Fatal(err)
	}
	if t.Failed() {
		return
	}
	m.eachCut(t, first, func(t *testing.T, dir string, moment int) {
		examine(t, filepath.Join(dir, "registry"), histories, moment)
	})
}

type worker struct {
	ctx       context.Context
	reg       *ocilocal.LocalRegistry
	mark      func() int
	rng       *rand.Rand
	histories map[string]history
}

// change makes one change and notes when.
func (w *worker) change(ref string, fn func() (digest.Digest, error)) error {
	begun := w.mark()
	d, err := fn()
	if err != nil {
		return err
	}
	w.histories[ref] = append(w.histories[ref], change{begun, w.mark(), d})
	return nil
}

func (w *worker) step(g, i int, archive []byte) error {
	name := fmt.Sprintf("example.com/g%d/a%d:v", g, w.rng.IntN(5))
	ref, err := ocilocal.ParseReference(name)
	if err != nil {
		return err
	}
	switch w.rng.IntN(8) {
	case 0:
		return w.change(name, func() (digest.Digest, error) {
			_, err := w.reg.Remove(w.ctx, ref)
			if errors.Is(err, ocilocal.ErrNotFound) {
				err = nil
			}
			return "", err
		})
	case 1:
		return w.change(name, func() (digest.Digest, error) {
			result, err := w.reg.ImportArchive(w.ctx, bytes.NewReader(archive), &ocilocal.ImportOptions{
				Reference: ref, Rename: true, PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}})
			if err != nil {
				return "", err
			}
			return result.Artifacts[0].Descriptor.Digest, nil
		})
	case 2:
		return w.change(name, func() (digest.Digest, error) { return w.serve(ref, fmt.Appendf(nil, "g%d i%d ", g, i)) })
	default:
		return w.change(name, func() (digest.Digest, error) {
			a, err := w.build(ref, fmt.Appendf(nil, "g%d i%d ", g, i))
			if err != nil {
				return "", err
			}
			return a.Digest(), nil
		})
	}
}

func (w *worker) build(ref ocilocal.Reference, layer []byte) (*ocilocal.LocalArtifact, error) {
	b, err := w.reg.NewBuilder(ref, &ocilocal.BuilderOptions{
		ArtifactType: "application/vnd.example", PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}})
	if err != nil {
		return nil, err
	}
	defer b.Cancel()
	for _, n := range []int{1, w.rng.IntN(2000)} { // the second is small or as large as some pages
		if _, err := b.AddLayerBytes(w.ctx, "application/octet-stream", bytes.Repeat(layer, n), nil); err != nil {
			return nil, err
		}
	}
	return b.Build(w.ctx)
}

// serve pushes an image to the handler, whose acknowledgement of the manifest is all that counts.
func (w *worker) serve(ref ocilocal.Reference, layer []byte) (digest.Digest, error) {
	h := w.reg.Handler(&ocilocal.HandlerOptions{Host: ref.Registry()})
	send := func(method, path string, body []byte, status int) (string, error) {
		res := httptest.NewRecorder()
		h.ServeHTTP(res, httptest.NewRequest(method, path, bytes.NewReader(body)))
		if res.Code != status {
			return "", fmt.Errorf("%s %s: %d %s", method, path, res.Code, res.Body)
		}
		return res.Header().Get("Location"), nil
	}
	base := "/v2/" + ref.Repository() + "/"
	layer = bytes.Repeat(layer, 1+w.rng.IntN(2000))
	config := []byte("{}")
	if _, err := send("POST", base+"blobs/uploads/?digest="+string(digest.FromBytes(config)), config, 201); err != nil {
		return "", err
	}
	at, err := send("POST", base+"blobs/uploads/", nil, 202)
	if err == nil {
		_, err = send("PATCH", at, layer[:len(layer)/2], 202)
	}
	if err == nil {
		_, err = send("PUT", at+"?digest="+string(digest.FromBytes(layer)), layer[len(layer)/2:], 201)
	}
	raw := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"application/vnd.example",
		"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},
		"layers":[{"mediaType":"text/plain","digest":%q,"size":%d}]}`, digest.FromBytes(config), digest.FromBytes(layer), len(layer))
	if err == nil {
		_, err = send("PUT", base+"manifests/"+ref.Tag(), raw, 201)
	}
	return digest.FromBytes(raw), err
}

// exported returns an archive with one artifact.
func exported(t *testing.T) []byte {
	reg, err := ocilocal.Open(t.Context(), filepath.Join(t.TempDir(), "r"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	ref, err := ocilocal.ParseReference("example.com/archive:v")
	if err != nil {
		t.Fatal(err)
	}
	w := &worker{ctx: t.Context(), reg: reg, rng: rand.New(rand.NewPCG(*seed, 0))}
	if _, err := w.build(ref, []byte("from an archive ")); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if err := reg.ExportArchive(t.Context(), &buf, []ocilocal.Reference{ref}, nil); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// examine judges the registry in root as the power cut left it.
func examine(t *testing.T, root string, histories map[string]history, moment int) {
	blobs := hashBlobs(t, root) // before Open, which may sweep
	reg, err := ocilocal.Open(t.Context(), root, nil)
	if err != nil {
		t.Errorf("after the cut: %v", err)
		return
	}
	defer reg.Close()
	found := map[string]digest.Digest{}
	for ref, err := range reg.Refs(t.Context(), nil) {
		if err != nil {
			t.Error(err)
			return
		}
		found[ref.Reference.String()] = ref.Descriptor.Digest
		if _, known := histories[ref.Reference.String()]; !known {
			t.Errorf("%s was never published", ref.Reference)
		}
		a, err := reg.Load(t.Context(), ref.Reference)
		if err != nil {
			t.Error(err)
			continue
		}
		if !blobs[a.Digest()] {
			t.Errorf("%s: manifest %s is not there", ref.Reference, a.Digest())
		}
		layers, err := a.Layers(t.Context())
		if err != nil {
			t.Error(err)
		}
		for _, l := range layers {
			if !blobs[l.Digest] {
				t.Errorf("%s: layer %s is not there", ref.Reference, l.Digest)
			}
		}
	}
	for ref, h := range histories {
		if may := h.at(moment); !slices.Contains(may, found[ref]) {
			t.Errorf("%s points at %q, may be any of %q", ref, found[ref], may)
		}
	}
}

// hashBlobs reads every file below blobs/ and complains of those that don't hash to their name.
func hashBlobs(t *testing.T, root string) map[digest.Digest]bool {
	good := map[digest.Digest]bool{}
	err := filepath.WalkDir(filepath.Join(root, "blobs"), func(name string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && e.IsDir() {
			return nil // cut before Open came to it
		}
		if err != nil {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		h := digest.SHA256.Digester()
		if _, err := io.Copy(h.Hash(), f); err != nil {
			return err
		}
		if h.Digest().Encoded() != e.Name() {
			t.Errorf("blob %s hashes to %s", e.Name(), h.Digest())
		}
		good[h.Digest()] = true
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return good
}

// TestCarelessWriter shows that this disk does lose what isn't synced: files that
// are written and renamed as most programs do it, without fsync.
func TestCarelessWriter(t *testing.T) {
	m := boot(t)
	first := m.mark()
	done := map[string]int{} // name → moment when it was "there"
	for i := range 50 {
		name := fmt.Sprint("file", i)
		tmp := filepath.Join(m.dir, "tmp")
		if err := os.WriteFile(tmp, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, filepath.Join(m.dir, name)); err != nil {
			t.Fatal(err)
		}
		done[name] = m.mark()
		if i%10 == 9 { // something else on the machine syncs now and then
			if err := run("sync", "-f", m.dir); err != nil {
				t.Fatal(err)
			}
		}
	}
	lost := 0
	m.eachCut(t, first, func(t *testing.T, dir string, moment int) {
		for name, at := range done {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if at <= moment && (err != nil || string(b) != name) {
				lost++
			}
		}
	})
	if lost == 0 {
		t.Error("no file was lost, so these cuts show nothing")
	}
}
