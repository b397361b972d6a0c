package ocilocal

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
)

// openTarStream looks at the first bytes of src and returns the tar in it. Compression is detected
// by content, because neither an io.Reader nor a file name says it reliably. Formats that this
// package cannot read get an error that names them. An empty src is an empty tar here: it fails
// later, because it has no index.json.
func openTarStream(ctx context.Context, src io.Reader) (*tarStream, error) {
	br := bufio.NewReaderSize(&ctxReader{ctx, src}, 64<<10)
	head, err := br.Peek(6)
	if err != nil && err != io.EOF {
		return nil, err
	}
	for magic, format := range map[string]string{
		"\x28\xb5\x2f\xfd": "zstd", "\x50\x2a\x4d\x18": "zstd", "\xfd7zXZ\x00": "xz", "BZh": "bzip2", "PK\x03\x04": "zip",
		"\x04\x22\x4d\x18": "lz4", "\x5d\x00\x00": "lzma", "LZIP": "lzip", "\x1f\x9d": "compress", "7z\xbc\xaf\x27\x1c": "7z",
	} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return nil, fmt.Errorf("%w: archive is compressed as %s; only plain tar and gzip are accepted", ErrUnsupportedMediaType, format)
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

// A gunzip reads a gzip stream of several members (RFC 1952, section 2.2). Zeros may follow the
// last member: some writers pad the last block so, and the program gzip ignores them. [gzip.Reader]
// in its multistream mode fails on them. So this reader goes from member to member itself, and
// looks at the byte after each one through the bufio.Reader.
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

// next goes to the next member. It returns [io.EOF] if there is none. Zeros are accepted at the end
// only. A member after zeros is [gzip.ErrHeader], because some programs would not read it.
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

// A countingReader counts the bytes that were read from src.
type countingReader struct {
	src io.Reader
	n   int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.src.Read(p)
	c.n += int64(n)
	return n, err
}

// A tarStream is the bytes of a tar. A gzipped one ends with [ErrTooLarge] if its bytes outside
// blobs are more than maxGzipRatio times the input. The check needs no buffer: it compares two
// counters after each read.
type tarStream struct {
	src   io.Reader
	in    *countingReader // the input of gzip; nil for a plain tar
	out   int64           // bytes that were read from src
	blobs int64           // the bytes of out that belong to blobs, or will do so: see readArchive
	// plain is src if that is not compressed. If the source can seek as well, skip passes over
	// blobs that nobody reads without reading them.
	plain *bufio.Reader
	seek  io.Seeker // the source of plain; nil if it cannot seek
}

func (s *tarStream) Read(p []byte) (int, error) {
	n, err := s.src.Read(p)
	s.out += int64(n)
	if more := s.out - s.blobs; s.in != nil && more > gzipRatioFreeBy && more/maxGzipRatio > s.in.n {
		return 0, fmt.Errorf("%w: gzip stream grows more than %d-fold beside its blobs", ErrTooLarge, maxGzipRatio)
	}
	return n, err
}

// skip passes over n bytes, and fails with [io.ErrUnexpectedEOF] if the stream has fewer.
//
// A seek beyond the end of a file succeeds. So skip seeks to the byte before the target and reads
// that one. plain has read ahead, and its buffer is discarded first: the seek starts at the
// position of the file, which is the end of that buffer.
func (s *tarStream) skip(n int64) error {
	if s.seek != nil && n > int64(s.plain.Size()) {
		buffered, err := s.plain.Discard(s.plain.Buffered())
		if err != nil {
			return err
		}
		if _, err := s.seek.Seek(n-int64(buffered)-1, io.SeekCurrent); err == nil {
			n = 1
		} else { // such as an *os.File of a pipe
			s.seek = nil
			n -= int64(buffered)
		}
	}
	_, err := io.CopyN(io.Discard, s, n)
	return cutOff(err)
}

// end reads the stream from the end of the tar to its own end, at most maxArchiveTail bytes. A tar
// ends with two zero blocks, but its writer may pad it, and a writer to a pipe must not be stopped
// before it is done. With gzip, the checksum comes last: without this read nobody would check it.
func (s *tarStream) end() error {
	n, err := io.Copy(io.Discard, io.LimitReader(s, maxArchiveTail))
	if err == nil && n == maxArchiveTail && s.in != nil {
		err = fmt.Errorf("%w: gzip stream goes on for %d bytes after the archive's end", ErrTooLarge, n)
	}
	return err
}
