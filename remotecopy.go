package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Copy copies an artifact from one remote reference to another, in the same registry or in two,
// without storing it. dst is the client of the registry of to. Nil means r.
//
// Blobs that the destination has are not transferred. Within one registry they are mounted if the
// registry allows that. Each blob is verified on its way: the last byte of a bad one is not sent.
// Copy overwrites an existing tag. It returns the descriptor of the manifest.
//
// ctx governs the call. Errors:
//   - [*RemoteError], as for [Remote.Resolve] of from and [LocalRegistry.Push] to to
//   - [ErrTooLarge] if the destination takes a blob only in chunks: then pull and push
//   - [ErrDigestMismatch] if the source has other bytes, or to names another digest
func (r *Remote) Copy(ctx context.Context, from, to Reference, dst *Remote) (desc ocispec.Descriptor, err error) {
	defer addOp(&err, "copy to "+to.String(), from.String(), "")
	c := &remoteCopy{seen: map[digest.Digest]bool{}}
	src := r
	if dst == nil {
		dst = r
	}
	if src == dst {
		// A request that sends a blob waits for the one that receives it. If both took their slots
		// from one host, enough copies at a time could wait for each other for ever.
		src = &Remote{Client: r.Client, Credentials: r.Credentials, PlainHTTP: r.PlainHTTP, Retry: r.Retry, MaxPerHost: r.MaxPerHost,
			StallTimeout: r.StallTimeout, UserAgent: r.UserAgent, AllowAddress: r.AllowAddress,
			SendCredentials: r.SendCredentials, Logger: r.Logger}
		if r.Client == nil {
			defer src.CloseIdleConnections()
		}
	}
	if c.from, err = src.repo(from); err != nil {
		return desc, err
	}
	if c.to, err = dst.repo(to); err != nil {
		return desc, err
	}
	m, err := c.from.manifest(ctx, c.from.reference(), "")
	if err != nil {
		return desc, err
	}
	if d := to.Digest(); d != "" && d != m.Digest() {
		return desc, fmt.Errorf("%w: manifest has digest %s, and is to be copied to %s", ErrDigestMismatch, m.Digest(), to)
	}
	if err := c.manifest(ctx, m, c.to.reference(), 0); err != nil {
		return desc, err
	}
	return m.Descriptor(), nil
}

// A remoteCopy is one call of Copy. Bytes go through memory only, a buffer at a time:
//
//	GET blob ──▶ countedBody ──▶ verifier ──▶ PUT upload
//
// The verifier keeps the last byte back until the digest is right. So a damaged blob makes the
// upload a byte too short, and the destination refuses it.
type remoteCopy struct {
	from, to *remoteRepo
	seen     map[digest.Digest]bool // digests that were copied or are being copied
}

// manifest copies everything that a manifest needs, and then the manifest. It waits for the
// manifest's own blobs before it begins with the members. So when a member is put, all blobs that
// were seen before are at the destination, also those that the member shares with its index.
func (c *remoteCopy) manifest(ctx context.Context, m *Manifest, reference string, depth int) error {
	if depth > MaxIndexNesting {
		return fmt.Errorf("%w: image indexes nested more than %d deep", ErrTooLarge, MaxIndexNesting)
	}
	t := newTasks(ctx, 4)
	var members []ocispec.Descriptor
	var err error
	for i, child := range m.children() {
		if c.seen[child.Digest] {
			continue
		}
		if c.seen[child.Digest] = true; len(c.seen) > MaxClosure {
			err = fmt.Errorf("%w: artifact has more than %d blobs", ErrTooLarge, MaxClosure)
		} else if m.childRole(i) == roleManifest {
			members = append(members, child)
		} else {
			err = t.start(func() error { return c.blob(t.ctx, child) })
		}
		if err != nil {
			break
		}
	}
	if err := t.wait(err); err != nil {
		return err
	}
	for _, d := range members {
		of, err := c.from.manifest(ctx, string(d.Digest), d.MediaType)
		if err == nil {
			err = c.manifest(ctx, of, string(d.Digest), depth+1)
		}
		if err != nil {
			return err
		}
	}
	return c.to.putManifest(ctx, reference, m)
}

// blob makes sure that the destination has a blob. Each attempt of the upload asks the source
// again, because a stream can't be read twice.
func (c *remoteCopy) blob(ctx context.Context, desc ocispec.Descriptor) error {
	has, err := c.to.hasBlob(ctx, desc)
	if err != nil || has == present {
		return err
	}
	var session *uploadSession
	if c.from.host.name == c.to.host.name && c.from.name != c.to.name {
		var done bool
		if done, session, err = c.to.mount(ctx, desc, c.from.name); done || err != nil {
			return err
		}
	}
	var buffers sync.Pool // only WriteTo of the verifier would use it
	u := &upload{repo: c.to, desc: desc}
	u.open = func(ctx context.Context) (io.ReadCloser, error) {
		res, _, err := c.from.blob(ctx, desc, 0)
		if err != nil {
			return nil, err
		}
		body := &countedBody{src: res.Body, count: func(int) {}}
		v := &verifier{ctx: ctx, src: body, digest: desc.Digest, size: desc.Size, hash: newHash(desc.Digest.Algorithm()), buffers: &buffers}
		return &copiedBody{repo: c.from, ctx: ctx, desc: desc, body: body, verifier: v}, nil
	}
	return u.run(ctx, session)
}

// A copiedBody is a blob on its way from one registry to another. Its errors name the source.
type copiedBody struct {
	repo     *remoteRepo
	ctx      context.Context
	desc     ocispec.Descriptor
	body     *countedBody
	verifier *verifier
}

func (b *copiedBody) Read(p []byte) (int, error) {
	n, err := b.verifier.Read(p)
	switch {
	case err == nil, err == io.EOF:
		return n, err
	case b.body.err == nil && errors.Is(err, ErrDigestMismatch):
		err = fmt.Errorf("%w: the source has other bytes", ErrDigestMismatch)
	}
	return n, b.repo.blobError(b.ctx, b.desc, b.body, err)
}

func (b *copiedBody) Close() error { return b.verifier.Close() }
