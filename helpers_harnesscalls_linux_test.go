// The calls that processes of TestHarness make. Each knows what its call may change, and what the
// call's errors mean.

package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

func (w *harnessWorker) newLabel(kind string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ids++
	return fmt.Sprintf("%s%d.%d.%d", kind, w.Worker, w.Life, w.ids)
}

// fillBuilder adds the layers and annotations of the artifact with a label.
func (w *harnessWorker) fillBuilder(ctx context.Context, b *ocilocal.Builder, label string, subject *ocispec.Descriptor) error {
	if err := b.SetAnnotation(labelKey, label); err != nil {
		return err
	}
	if subject != nil {
		if err := b.SetSubject(*subject); err != nil {
			return err
		}
	}
	for i, l := range harnessLayers(label) {
		if i > 0 { // what others have too: taken over if it is there
			desc := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: digest.FromBytes(l), Size: int64(len(l))}
			err := b.AddExistingLayer(ctx, desc)
			if err == nil {
				continue
			}
			if !errors.Is(err, ocilocal.ErrNotFound) {
				return err
			}
		}
		if _, err := b.AddLayer(ctx, "application/octet-stream", bytes.NewReader(l), nil); err != nil {
			return err
		}
	}
	return nil
}

func (w *harnessWorker) build(rng *rand.Rand) {
	ref, label := harnessRef(rng.IntN(harnessRefs)), w.newLabel("w")
	opts := &ocilocal.BuilderOptions{ArtifactType: testType, Format: harnessFormat(label)}
	opts.Policy = ocilocal.Policy(rng.IntN(2))
	var subject *ocispec.Descriptor
	if e, ok := w.earlier(rng); ok && rng.IntN(4) == 0 {
		subject = &e.desc
	}
	swap := rng.IntN(6) == 0
	w.change(rng, "build", ref, label, func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		if swap {
			d, err := r.Resolve(ctx, ref)
			if err != nil && !errors.Is(err, ocilocal.ErrNotFound) {
				return err
			}
			opts.Expected = d.Digest
		}
		b, err := r.NewBuilder(ref, opts)
		if err != nil {
			return err
		}
		defer b.Cancel()
		if err := w.fillBuilder(ctx, b, label, subject); err != nil {
			return err
		}
		a, err := b.Build(ctx)
		if err == nil {
			w.built(label, a.Descriptor())
		}
		return err
	}, ocilocal.ErrConflict)
}

func (w *harnessWorker) anonymous(rng *rand.Rand) {
	if rng.IntN(4) == 0 {
		w.call(rng, "prune", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
			_, err := r.PruneAnonymous(ctx, &ocilocal.PruneOptions{OlderThan: ocilocal.NoGrace})
			return err
		})
		return
	}
	label := w.newLabel("a")
	w.record(logLine{Kind: "anonymous", Label: label})
	w.call(rng, "anonymous", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		b, err := r.NewAnonymousBuilder(&ocilocal.BuilderOptions{ArtifactType: testType, Format: harnessFormat(label)})
		if err != nil {
			return err
		}
		defer b.Cancel()
		if err := w.fillBuilder(ctx, b, label, nil); err != nil {
			return err
		}
		_, err = b.Build(ctx)
		return err
	})
}

func (w *harnessWorker) giveUp(rng *rand.Rand) {
	w.call(rng, "give up", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		b, err := r.NewBuilder(harnessRef(0), &ocilocal.BuilderOptions{ArtifactType: testType})
		if err != nil {
			return err
		}
		if err := w.fillBuilder(ctx, b, w.newLabel("g"), nil); err != nil {
			b.Cancel()
			return err
		}
		return b.Cancel()
	})
}

func (w *harnessWorker) tag(rng *rand.Rand) {
	e, ok := w.earlier(rng)
	if !ok {
		return
	}
	ref := harnessRef(rng.IntN(harnessRefs))
	w.change(rng, "tag", ref, e.label, func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.Tag(ctx, e.desc.Digest, ref, &ocilocal.PublishOptions{Policy: ocilocal.Policy(rng.IntN(2))})
		return err
	}, ocilocal.ErrConflict, ocilocal.ErrNotFound, ocilocal.ErrIncomplete)
}

func (w *harnessWorker) remove(rng *rand.Rand) {
	ref := harnessRef(rng.IntN(harnessRefs))
	w.change(rng, "remove", ref, "", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.Remove(ctx, ref)
		return err
	}, ocilocal.ErrNotFound)
}

// read reads all content of a ref. Between two steps the ref may be moved, and its content
// collected.
func (w *harnessWorker) read(rng *rand.Rand) {
	ref := harnessRef(rng.IntN(harnessRefs))
	if w.Server != "" && rng.IntN(2) == 0 {
		ref = ocilocal.MustParseReference(w.Server + "/" + remoteName(rng.IntN(remoteRefs)))
	}
	start := w.clock.next()
	w.call(rng, "read", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		desc, err := r.Resolve(ctx, ref)
		end := w.clock.next()
		if errors.Is(err, ocilocal.ErrNotFound) {
			w.record(logLine{Kind: "read", Start: start, End: end, Ref: ref.String()})
			return nil
		}
		if err != nil {
			return err
		}
		label, err := w.contents(ctx, r, desc, rng.IntN(2) == 0)
		if errors.Is(err, ocilocal.ErrNotFound) {
			now, resolveErr := r.Resolve(ctx, ref)
			if errors.Is(resolveErr, ocilocal.ErrNotFound) || resolveErr == nil && now.Digest != desc.Digest {
				return nil
			}
			if resolveErr == nil && w.movedSince(ctx, r, ref, desc) {
				return nil
			}
			w.fault("%s leads to %s, which is not whole: %v, %v", ref, desc.Digest, err, resolveErr)
			return nil
		}
		if err == nil {
			w.record(logLine{Kind: "read", Start: start, End: end, Ref: ref.String(), Label: label})
			w.built(label, desc)
		}
		return err
	})
}

// movedSince reports whether a ref has moved since a blob of its artifact was missing. It may also
// have moved away and back, with a collection in between; then the artifact is whole now.
func (w *harnessWorker) movedSince(ctx context.Context, r *ocilocal.LocalRegistry, ref ocilocal.Reference, desc ocispec.Descriptor) bool {
	for range 3 {
		if _, err := w.contents(ctx, r, desc, false); err == nil {
			return true
		}
		if now, err := r.Resolve(ctx, ref); err != nil || now.Digest != desc.Digest {
			return true
		}
	}
	return false
}

// contents reads an artifact, compares it with what its label says, and returns the label.
func (w *harnessWorker) contents(ctx context.Context, r *ocilocal.LocalRegistry, desc ocispec.Descriptor, viaFS bool) (string, error) {
	a, err := r.LoadDigest(ctx, desc.Digest)
	if err != nil {
		return "", err
	}
	annotations, err := a.Annotations(ctx)
	if err != nil {
		return "", err
	}
	label := annotations[labelKey]
	layers, err := a.Layers(ctx)
	if err != nil {
		return "", err
	}
	var want [][]byte
	if !strings.HasPrefix(label, "remote") {
		want = harnessLayers(label)
		if len(want) != len(layers) {
			w.fault("%s has %d layers, want %d", label, len(layers), len(want))
			return label, nil
		}
	}
	for i, l := range layers {
		var body []byte
		if viaFS {
			tree, err := a.FS(ctx)
			if err != nil {
				return "", err
			}
			body, err = fs.ReadFile(tree, l.Digest.String())
			if errors.Is(err, fs.ErrNotExist) {
				err = &ocilocal.Error{Op: "read", Err: ocilocal.ErrNotFound}
			}
			if err != nil {
				if cause := errors.Unwrap(err); cause != nil {
					err = &ocilocal.Error{Op: "read", Err: cause}
				}
				return "", err
			}
		} else if body, err = a.ReadLayer(ctx, l); err != nil {
			return "", err
		}
		if want != nil && !bytes.Equal(body, want[i]) {
			w.fault("layer %d of %s has %d wrong bytes", i, label, len(body))
		}
	}
	return label, nil
}

// list lists all refs. Each must have a name that a call gave.
func (w *harnessWorker) list(rng *rand.Rand) {
	w.call(rng, "list", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		for ref, err := range r.Refs(ctx, nil) {
			if err != nil {
				return err
			}
			known := strings.HasSuffix(ref.Reference.Name(), ".ocilocal.local/anonymous") || w.Server != "" && ref.Reference.Registry() == w.Server
			for n := range harnessRefs {
				known = known || ref.Reference == harnessRef(n)
			}
			if !known {
				w.fault("%s is listed, and no call made it", ref.Reference)
			}
		}
		return nil
	})
}

// source picks an artifact, reads it, and so knows its label.
func (w *harnessWorker) source(rng *rand.Rand) (e builtArtifact, ok bool) {
	ref := harnessRef(rng.IntN(harnessRefs))
	w.call(rng, "source", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		desc, err := r.Resolve(ctx, ref)
		if err != nil {
			return err
		}
		label, err := w.contents(ctx, r, desc, false)
		e, ok = builtArtifact{label, desc}, err == nil
		return err
	}, ocilocal.ErrNotFound)
	return e, ok
}

// archive exports an artifact to an archive, and imports that under another name.
func (w *harnessWorker) archive(rng *rand.Rand) {
	e, ok := w.source(rng)
	if !ok {
		return
	}
	opts := &ocilocal.ExportOptions{Digests: []digest.Digest{e.desc.Digest}, Gzip: rng.IntN(2) == 0, Overwrite: true}
	name := filepath.Join(w.Dir, "archive.tar")
	var buf bytes.Buffer
	toFile := rng.IntN(2) == 0
	outcome, _ := w.call(rng, "export archive", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		if toFile {
			return r.ExportArchiveFile(ctx, name, nil, opts)
		}
		return r.ExportArchive(ctx, &buf, nil, opts)
	}, ocilocal.ErrNotFound, ocilocal.ErrIncomplete)
	if outcome != "ok" {
		return
	}
	ref := harnessRef(rng.IntN(harnessRefs))
	w.change(rng, "import archive", ref, e.label, func(ctx context.Context, r *ocilocal.LocalRegistry) (err error) {
		im := &ocilocal.ImportOptions{Select: e.desc.Digest.String(), Reference: ref, PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Policy(rng.IntN(2))}}
		if toFile {
			_, err = r.ImportArchiveFile(ctx, name, im)
		} else {
			_, err = r.ImportArchive(ctx, &buf, im)
		}
		return err
	}, ocilocal.ErrConflict, ocilocal.ErrNotFound) // another goroutine may have replaced the file
}

// layout does the same with a directory, to which one export after another adds.
func (w *harnessWorker) layout(rng *rand.Rand) {
	e, ok := w.source(rng)
	if !ok {
		return
	}
	dir := filepath.Join(w.Dir, "layout")
	outcome, _ := w.call(rng, "export layout", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		return r.ExportLayout(ctx, dir, nil, &ocilocal.ExportOptions{Digests: []digest.Digest{e.desc.Digest}, Overwrite: true})
	}, ocilocal.ErrNotFound, ocilocal.ErrIncomplete)
	if outcome != "ok" {
		return
	}
	ref := harnessRef(rng.IntN(harnessRefs))
	w.change(rng, "import layout", ref, e.label, func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.ImportLayout(ctx, dir, &ocilocal.ImportOptions{Select: e.desc.Digest.String(), Reference: ref,
			PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Policy(rng.IntN(2))}})
		return err
	}, ocilocal.ErrConflict)
}

func (w *harnessWorker) convert(rng *rand.Rand) {
	e, ok := w.source(rng)
	if !ok {
		return
	}
	dst := harnessRef(rng.IntN(harnessRefs))
	w.change(rng, "convert", dst, e.label, func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		src, err := dst.WithDigest(e.desc.Digest)
		if err != nil {
			return err
		}
		_, err = r.Convert(ctx, src, dst, &ocilocal.ConvertOptions{Subject: ocilocal.SubjectNone,
			PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}})
		return err
	}, ocilocal.ErrNotFound, ocilocal.ErrIncomplete)
}

func (w *harnessWorker) collect(rng *rand.Rand) {
	opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace, DropReferrers: rng.IntN(3) > 0}
	if rng.IntN(8) == 0 {
		opts.Grace = 0
	}
	if e, ok := w.earlier(rng); ok && rng.IntN(4) == 0 {
		opts.Protect = []digest.Digest{e.desc.Digest}
	}
	w.call(rng, "gc", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		report, err := r.GC(ctx, opts)
		if report != nil && (len(report.Invalid) > 0 || len(report.Foreign) > 0 || report.Unreconciled) {
			w.fault("gc: invalid %v, foreign %q, unreconciled %v", report.Invalid, report.Foreign, report.Unreconciled)
		}
		return err
	})
}

// look makes the calls that only count and report.
func (w *harnessWorker) look(rng *rand.Rand) {
	w.call(rng, "stats", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.Stats(ctx)
		return err
	})
	w.call(rng, "gc report", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.GCReport(ctx, nil)
		return err
	})
	w.call(rng, "history", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		a, err := r.Load(ctx, harnessRef(rng.IntN(harnessRefs)))
		if err != nil {
			return err
		}
		for _, err := range a.History(ctx) {
			if err != nil {
				return err
			}
		}
		return nil
	}, ocilocal.ErrNotFound)
}

func (w *harnessWorker) verify(rng *rand.Rand) {
	w.call(rng, "verify", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		for p, err := range r.Verify(ctx, &ocilocal.VerifyOptions{Quick: rng.IntN(2) == 0}) {
			if err != nil {
				return err
			}
			if p.Kind != ocilocal.ProblemUnrecorded && p.Kind != ocilocal.ProblemCollected && p.Kind != ocilocal.ProblemMissing {
				w.fault("verify: %v", p)
			}
		}
		return nil
	})
}

// repair finds no damage. It may record or rewrite what other processes are working on.
func (w *harnessWorker) repair(rng *rand.Rand) {
	w.call(rng, "repair", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		report, err := r.Repair(ctx, nil)
		if report != nil && len(report.Healed)+len(report.Quarantined)+len(report.Recovered) > 0 {
			w.fault("repair of a sound registry: %+v", report)
		}
		return err
	})
}

func (w *harnessWorker) backup(rng *rand.Rand) {
	w.call(rng, "backup", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		report, err := r.Backup(ctx, w.Backup, nil)
		if report != nil && len(report.Failed) > 0 {
			w.fault("backup: %v", report.Failed)
		}
		return err
	}, ocilocal.ErrBusy)
}

func (w *harnessWorker) readOnly(rng *rand.Rand) {
	w.call(rng, "read only", func(ctx context.Context, _ *ocilocal.LocalRegistry) error {
		r, err := ocilocal.OpenReadOnly(ctx, w.Root, nil)
		if err != nil {
			return err
		}
		defer r.Close()
		for _, err := range r.Refs(ctx, nil) {
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func (w *harnessWorker) pull(rng *rand.Rand) {
	n := rng.IntN(remoteRefs)
	ref := ocilocal.MustParseReference(w.Server + "/" + remoteName(n))
	opts := &ocilocal.PullOptions{PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}}
	as := ref
	if rng.IntN(2) == 0 {
		opts.As, as = harnessRef(rng.IntN(harnessRefs)), harnessRef(rng.IntN(harnessRefs))
		opts.As = as
	}
	w.change(rng, "pull", as, remoteLabel(n), func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.Pull(ctx, ref, opts)
		return err
	})
}

func (w *harnessWorker) push(rng *rand.Rand) {
	ref := harnessRef(rng.IntN(harnessRefs))
	as := ocilocal.MustParseReference(fmt.Sprintf("%s/pushed/p%d:v1", w.Server, rng.IntN(4)))
	w.call(rng, "push", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.Push(ctx, ref, &ocilocal.PushOptions{As: as})
		return err
	}, ocilocal.ErrNotFound, ocilocal.ErrIncomplete)
}
