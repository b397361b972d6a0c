package ocilocal

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
)

// openTarStream looks at the first bytes and returns the tar.
func openTarStream(ctx context.Context, src io.Reader) (*tarStream, error) {
	br := bufio.NewReaderSize(&ctxReader{ctx, src}, 64<<10)
	head, err := br.Peek(6)
	if err != nil && err != io.EOF {
		return nil, err
	}
	for magic, format := range map[string]string{
		"\x28\xb5\x2f\xfd": "zstd", "\xfd7zXZ\x00": "xz", "BZh": "bzip2", "PK\x03\x04": "zip",
	} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return nil, fmt.Errorf("%w: archive is compressed as %s; plain tar and gzip are taken", ErrUnsupportedMediaType, format)
		}
	}
	if !bytes.HasPrefix(head, []byte("\x1f\x8b")) {
		seek, _ := src.(io.Seeker)
		return &tarStream{src: br, plain: br, seek: seek}, nil
	}
	in := &countingReader{src: br}
	z, err := newGunzip(in)
	return &tarStream{src: z, in: in}, err
}

// A gunzip reads a gzip stream of several members, which may end in zeros: they fill up the
// last block on a tape, and elsewhere too. gzip itself ignores them.
type gunzip struct {
	in *bufio.Reader
	z  *gzip.Reader
}

func newGunzip(src io.Reader) (*gunzip, error) {
	g := &gunzip{in: bufio.NewReader(src)}
	var err error
	if g.z, err = gzip.NewReader(g.in); err == nil {
		g.z.Multistream(false)
	}
	return g, err
}

func (g *gunzip) Read(p []byte) (int, error) {
	n, err := g.z.Read(p)
	if err == io.EOF {
		err = g.next()
	}
	return n, err
}

// next goes to the next member. [io.EOF] says that there is none.
func (g *gunzip) next() error {
	for zeros := 0; ; zeros++ {
		b, err := g.in.ReadByte()
		switch {
		case err != nil:
			return err
		case b == 0 && zeros < maxArchiveTail:
			continue
		case zeros > 0:
			return gzip.ErrHeader
		}
		if err := g.in.UnreadByte(); err != nil {
			return err
		}
		err = g.z.Reset(g.in)
		g.z.Multistream(false)
		return cutOff(err)
	}
}

type countingReader struct {
	src io.Reader
	n   int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.src.Read(p)
	c.n += int64(n)
	return n, err
}

// tarStream is a tar. From a gzip stream, it ends with [ErrTooLarge] when what it has
// beside its blobs is out of all proportion to the input.
type tarStream struct {
	src   io.Reader
	in    *countingReader // what gzip reads; nil for a plain tar
	out   int64
	blobs int64 // bytes of out that are, or will be, those of blobs
	// A plain tar that comes from a file is not read where nobody needs it.
	plain *bufio.Reader // src
	seek  io.Seeker     // what plain reads; nil if that can't seek
}

func (s *tarStream) Read(p []byte) (int, error) {
	n, err := s.src.Read(p)
	s.out += int64(n)
	if more := s.out - s.blobs; s.in != nil && more > gzipRatioFreeBy && more/maxGzipRatio > s.in.n {
		return 0, fmt.Errorf("%w: gzip stream grows more than %d-fold beside its blobs", ErrTooLarge, maxGzipRatio)
	}
	return n, err
}

// skip passes over n bytes. All must be there.
func (s *tarStream) skip(n int64) error {
	if s.seek != nil && n > int64(s.plain.Size()) {
		buffered, err := s.plain.Discard(s.plain.Buffered())
		if err != nil {
			return err
		}
		// The last byte is read, which shows that the file does not end before it.
		if _, err := s.seek.Seek(n-int64(buffered)-1, io.SeekCurrent); err == nil {
			n = 1
		} else { // a pipe, perhaps
			s.seek = nil
			n -= int64(buffered)
		}
	}
	_, err := io.CopyN(io.Discard, s, n)
	return cutOff(err)
}

// end reads on from the end of the tar, which need not be that of the stream: whoever
// writes it may have more to say, and gzip's checksum comes last.
func (s *tarStream) end() error {
	n, err := io.Copy(io.Discard, io.LimitReader(s, maxArchiveTail))
	if err == nil && n == maxArchiveTail && s.in != nil {
		err = fmt.Errorf("%w: gzip stream goes on for %d bytes after the archive's end", ErrTooLarge, n)
	}
	return err
}
