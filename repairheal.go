package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// heal takes wanted blobs from the sources, in order. If a source fails, it goes into the report,
// the first such error goes into p.sourceErr, and the next source is searched.
func (p *repair) heal(ctx context.Context) error {
	for _, source := range p.opts.Sources {
		if len(p.wanted) == 0 {
			return nil
		}
		bad, err := p.healFrom(ctx, source)
		if err != nil {
			return err
		}
		if bad != nil {
			p.sourceFailed(source, bad)
		}
	}
	return nil
}

// sourceFailed reports a source, once.
func (p *repair) sourceFailed(source string, err error) {
	for _, f := range p.report.FailedSources {
		if f.Source == source {
			return
		}
	}
	p.report.FailedSources = append(p.report.FailedSources, SourceFailure{Source: source, Err: err})
	if p.sourceErr == nil {
		p.sourceErr = fmt.Errorf("source %s: %w", source, err)
	}
}

// A healing takes blobs from one source into a stage. It must tell two kinds of errors apart: an
// error of the source ends only the search of this source, and an error of the registry ends the
// repair. readArchive and layout report both in the same way, so put keeps the second kind in own.
type healing struct {
	*repair
	stage *stage
	found []digest.Digest
	own   error // of the registry or the process, not of the source
}

// healFrom takes wanted blobs from one source. bad is an error of the source. The blobs that were
// found before it are used. err is an error of the registry or the process. Blobs leave p.wanted
// only after settle, when they are durable.
func (p *repair) healFrom(ctx context.Context, source string) (bad, err error) {
	h := &healing{repair: p, stage: p.registry.blobs.newStage()}
	defer func() { p.registry.logDiscard(h.stage.discard()) }()
	fi, bad := os.Stat(source)
	switch {
	case bad != nil:
	case fi.IsDir():
		bad = h.fromLayout(ctx, source)
	default:
		bad = h.fromArchive(ctx, source)
	}
	// A condition of the process says nothing about the source, so it ends the repair as well.
	if h.own != nil || processCondition(bad) {
		return nil, errors.Join(h.own, bad)
	}
	if err := h.stage.settle(ctx, nil); err != nil {
		return bad, err
	}
	for _, d := range h.found {
		if p.wanted[d] {
			delete(p.wanted, d)
			p.report.Healed = append(p.report.Healed, d)
		}
	}
	return bad, nil
}

// put stages a source's copy of d if d is wanted. A damaged copy is skipped: another source may
// have a good one. Any other error is that of the source if the reader failed, and otherwise that
// of the registry, such as a full disk.
func (h *healing) put(ctx context.Context, d digest.Digest, src io.Reader, size int64) error {
	if !h.wanted[d] {
		return nil
	}
	var ok bool
	if ok, h.own = h.rightSize(d, size); !ok || h.own != nil {
		return h.own
	}
	h.meter.plan(1, size)
	item := h.meter.item(ocispec.Descriptor{Digest: d, Size: size})
	in := &sourceReader{src: item.reader(src)}
	_, _, err := h.stage.put(ctx, in, "", d, size)
	if err == nil {
		item.end()
		h.found = append(h.found, d)
		return nil
	}
	item.drop()
	switch {
	case errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrSizeMismatch):
		return nil
	case in.err == nil:
		h.own = err
	}
	return err
}

// A sourceReader remembers the error of its source. So put knows which side of a copy has failed.
type sourceReader struct {
	src io.Reader
	err error
}

func (r *sourceReader) Read(p []byte) (int, error) {
	n, err := r.src.Read(p)
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}

// rightSize reports whether a source's copy of d may be good, by its size. put asks before it reads
// the copy, because a sparse file can be larger than the disk. If neither the index nor a manifest
// says the size of d, the copy may be as large as a manifest or as the damaged file.
func (p *repair) rightSize(d digest.Digest, size int64) (bool, error) {
	desc, _, err := p.describe(d)
	if err != nil {
		return false, err
	}
	if desc.Digest != "" {
		return size == desc.Size, nil
	}
	here, err := p.registry.blobs.size(d)
	if processCondition(err) {
		return false, err
	}
	return size <= max(here, MaxManifestSize), nil
}

// fromLayout takes blobs from a directory. It reads only blobs/, so the directory need not be a
// valid layout. A blob that cannot be read does not stop the others: the error is that of the last
// one. An error of the process stops all.
func (h *healing) fromLayout(ctx context.Context, dir string) (bad error) {
	root, err := openRoot(dir, h.registry.root.fault)
	if err != nil {
		return err
	}
	defer root.Close()
	l := &layout{root: root}
	for d := range h.wanted {
		f, err := l.open(ocispec.Descriptor{Digest: d})
		if errors.Is(err, ErrIncomplete) {
			continue
		}
		if err == nil {
			fi, statErr := f.Stat()
			if err = statErr; err == nil {
				err = h.put(ctx, d, f, fi.Size())
			}
			err = errors.Join(err, f.Close())
		}
		if h.own != nil || processCondition(err) {
			return err
		}
		if err != nil {
			bad = err
		}
	}
	return bad
}

// fromArchive takes blobs from an archive. The archive need not have a valid index.json.
func (h *healing) fromArchive(ctx context.Context, name string) error {
	f, err := h.registry.openOther(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = readArchive(ctx, f, h.put)
	return err
}
