package ocilocal

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
)

// A tarReader reads a tar, entry by entry.
//
// The rules of tar have grown for forty years, and two programs can see different files in one
// archive. One applies a global header that the other ignores. One takes the first of two long
// names, and the other the second. So an archive could show a harmless index.json to a scanner and
// another one to this package. [archive/tar] resolves such cases silently. This reader fails with
// [tar.ErrHeader] where known programs disagree about the name, the size or the place of an entry:
//
//   - a global header that sets a path, a size or a sparse file, and Solaris's extended headers;
//   - two headers that name the same entry, and a header without an entry after it;
//   - numbers that are not plain octal or GNU's base 256, values that are empty, names that do not
//     end;
//   - links, directories and devices that have a size, since some programs skip that many bytes.
//
// It reads v7, ustar, PAX, GNU and star archives, and never holds more than 1 MiB of a header. A
// fuzz test compares it with [archive/tar], so that the two never see different files.
//
// The fields of a header block that it uses, by their offsets (POSIX.1, pax, "ustar Interchange
// Format"):
//
//	0 name · 124 size · 148 checksum · 156 type · 257 magic · 345 prefix
//	482, 504 "the sparse map goes on", of GNU's sparse files
//	508 magic of star, whose prefix ends at 476
type tarReader struct {
	src   *tarStream
	left  int64 // bytes of the entry's data that were not read yet
	pad   int64 // bytes between the data and the next block
	block [tarBlock]byte
}

const (
	tarBlock  = 512
	maxTarExt = 1 << 20 // bytes of an extension header
)

// A tarEntry is one file of a tar.
type tarEntry struct {
	name string
	size int64 // of the data in the archive
	kind byte  // [tar.TypeReg], [tar.TypeDir], …
	// sparse is set if the file is larger than its data in the archive. alias is the name that some
	// programs give such a file (the PAX record GNU.sparse.name).
	sparse bool
	alias  string
	// odd is set if the header is not ustar's but has a prefix, which some programs put before the
	// name.
	odd bool
}

// A tarExtension holds the contents of the extension headers before an entry.
type tarExtension struct {
	records  map[string]string // of a PAX header
	longName string            // of a GNU header
	seen     string            // the type of each header, to refuse a second one of a type
}

// next returns the next entry, and [io.EOF] at the end. It skips the data of the entry before, as
// far as nobody has read it. An entry has any number of extension headers before it:
//
//	x (PAX) · g (PAX, global) · L (GNU long name) · K (GNU long link name) · X (Solaris)
func (t *tarReader) next() (*tarEntry, error) {
	if err := t.skip(); err != nil {
		return nil, err
	}
	var x tarExtension
	for {
		more, err := t.header()
		if err != nil {
			return nil, err
		}
		if !more {
			if x.seen != "" {
				return nil, tarError("an extension header without an entry")
			}
			return nil, io.EOF
		}
		size, err := tarNumber(t.block[124:136])
		if err != nil {
			return nil, err
		}
		kind := t.block[156]
		if strings.IndexByte("xgXLK", kind) < 0 {
			return t.entry(&x, kind, size)
		}
		if err := t.extend(&x, kind, size); err != nil {
			return nil, err
		}
	}
}

// Read reads the entry's data. If the stream ends within it, that is [io.ErrUnexpectedEOF]: a file
// that is cut off never looks complete.
func (t *tarReader) Read(p []byte) (int, error) {
	if t.left == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > t.left {
		p = p[:t.left]
	}
	n, err := t.src.Read(p)
	t.left -= int64(n)
	if err == io.EOF && t.left > 0 {
		err = io.ErrUnexpectedEOF
	} else if err == io.EOF {
		err = nil
	}
	return n, err
}

// skip goes to the block after the entry. left and pad become 0 first, so that the reader returns
// io.EOF for the entry even if skipping fails.
func (t *tarReader) skip() error {
	n := t.left + t.pad
	t.left, t.pad = 0, 0
	return t.src.skip(n)
}

// header reads the next header block into t.block. more is false at the end of the archive. Two
// zero blocks mark that end. A missing mark, or half of it, is accepted, because many programs
// leave it out. An entry after a single zero block is refused: some programs stop there, and others
// go on.
func (t *tarReader) header() (more bool, err error) {
	for zeros := 0; zeros < 2; zeros++ {
		if _, err := io.ReadFull(t.src, t.block[:]); err == io.EOF {
			return false, nil
		} else if err != nil {
			return false, err
		}
		if t.block != [tarBlock]byte{} {
			if zeros > 0 {
				return false, tarError("an entry after half of the archive's end")
			}
			return true, t.checkFields()
		}
	}
	return false, nil
}

// checkFields checks the checksum, and the number fields that this package does not use: mode, uid,
// gid, mtime, and the two device numbers. A program that cannot read one of them takes the header
// for the end of the archive, and so would see fewer files. The checksum is the sum of all bytes,
// its own field counted as spaces. Old programs summed signed bytes, so both sums are accepted.
func (t *tarReader) checkFields() error {
	for _, field := range [][2]int{{100, 108}, {108, 116}, {116, 124}, {136, 148}, {329, 337}, {337, 345}} {
		b := t.block[field[0]:field[1]]
		if b[0] == 0x80 || b[0] == 0xff {
			continue // base 256, perhaps negative
		}
		if _, err := tarNumber(b); err != nil {
			return err
		}
	}
	want, err := tarNumber(t.block[148:156])
	if err != nil {
		return err
	}
	var unsigned, signed int64
	for i, c := range t.block {
		if i >= 148 && i < 156 {
			c = ' '
		}
		unsigned += int64(c)
		signed += int64(int8(c))
	}
	if want != unsigned && want != signed {
		return tarError("a wrong checksum")
	}
	return nil
}

// extend reads an extension header into x. Its data is read to the end of its last block. Errors
// are those of a header that two programs could apply differently: see tarReader.
func (t *tarReader) extend(x *tarExtension, kind byte, size int64) error {
	if size > maxTarExt {
		return fmt.Errorf("%w: an extension header of %d bytes", tar.ErrFieldTooLong, size)
	}
	blocks := make([]byte, size+-size&(tarBlock-1))
	if _, err := io.ReadFull(t.src, blocks); err != nil {
		return cutOff(err)
	}
	data := blocks[:size]
	switch {
	case kind == 'X':
		return tarError("a Solaris extended header")
	case kind == 'g' && x.seen != "", strings.IndexByte(x.seen, kind) >= 0:
		return tarError("extension headers that contradict each other")
	case kind == 'g':
		records, err := paxRecords(data)
		for key := range records {
			if key == "path" || key == "linkpath" || key == "size" || strings.HasPrefix(key, "GNU.sparse.") {
				return tarError("a global header with " + key)
			}
		}
		return err
	}
	x.seen += string(kind)
	var err error
	switch kind {
	case 'x':
		x.records, err = paxRecords(data)
	case 'L':
		if x.longName = tarText(data); x.longName == "" || x.longName != tarText(blocks) {
			err = tarError("a long name that is empty or does not end")
		}
	}
	if _, named := x.records["path"]; named && x.longName != "" {
		err = tarError("two long names for one entry")
	}
	return err
}

// entry makes an entry of the block that was read and the headers before it. A later source of the
// name wins over an earlier one:
//
//	the name field, with ustar's prefix → GNU's long name → the PAX record "path"
//
// extend has refused a long name together with a "path". The size is that of the field or of the
// PAX record "size".
func (t *tarReader) entry(x *tarExtension, kind byte, size int64) (*tarEntry, error) {
	e := &tarEntry{name: tarText(t.block[:100]), size: size, kind: kind}
	gnu := string(t.block[257:265]) == "ustar  \x00"
	switch prefix := t.block[345:500]; {
	case string(t.block[257:263]) == "ustar\x00":
		if string(t.block[508:512]) == "tar\x00" { // star has times after a shorter prefix
			prefix = prefix[:131]
		}
		if s := tarText(prefix); s != "" {
			e.name = s + "/" + e.name
		}
	default:
		e.odd = prefix[0] != 0
	}
	if x.longName != "" {
		e.name = x.longName
	}
	if err := e.applyPAX(x.records); err != nil {
		return nil, err
	}
	if kind == 0 { // v7 has no other mark of a directory than its name
		e.kind = tar.TypeReg
		if strings.HasSuffix(e.name, "/") || strings.HasSuffix(tarText(t.block[:100]), "/") {
			e.kind = tar.TypeDir
		}
	}
	switch e.kind {
	case tar.TypeLink, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeDir, tar.TypeFifo:
		if e.size != 0 {
			return nil, tarError("a link, device or directory that has a size")
		}
	case tar.TypeGNUSparse:
		e.sparse = true
		if _, resized := x.records["size"]; resized || !gnu {
			return nil, tarError("a sparse file in two formats at once")
		}
		if err := t.skipSparseMap(); err != nil {
			return nil, err
		}
	}
	if e.size > math.MaxInt64-tarBlock {
		return nil, tarError("a size that no file can have")
	}
	t.left, t.pad = e.size, -e.size&(tarBlock-1)
	return e, nil
}

// applyPAX replaces an entry's name and size by the records of a PAX header. A record that starts
// with "GNU.sparse." marks a sparse file. Its size is ambiguous: that of the data, or that of the
// file when it is unpacked. So a sparse file with a record "size" is refused.
func (e *tarEntry) applyPAX(records map[string]string) error {
	for key := range records {
		e.sparse = e.sparse || strings.HasPrefix(key, "GNU.sparse.")
	}
	e.alias = records["GNU.sparse.name"]
	if name, ok := records["path"]; ok {
		if e.name = name; name == "" {
			return tarError("an empty path")
		}
	}
	if text, ok := records["size"]; ok {
		n, err := strconv.ParseUint(text, 10, 63)
		if err != nil || e.sparse {
			return tarError("a size that is not a number, or that of a sparse file")
		}
		e.size = int64(n)
	}
	return nil
}

// skipSparseMap skips the blocks between the header of an old GNU sparse file and its data. They
// continue the map of the file's holes, which is not needed: layoutName refuses sparse files that a
// layout could use, and the others are skipped.
func (t *tarReader) skipSparseMap() error {
	for more := t.block[482]; more != 0; more = t.block[504] {
		if _, err := io.ReadFull(t.src, t.block[:]); err != nil {
			return cutOff(err)
		}
	}
	return nil
}

// paxRecords reads the records of a PAX header (POSIX.1, pax, "pax Header Block"): each is "length
// key=value\n", and length counts the whole record. Of equal keys, the last one counts. A name with
// a NUL is refused, because programs in C end it there.
func paxRecords(data []byte) (map[string]string, error) {
	records := map[string]string{}
	for len(data) > 0 {
		length, _, ok := bytes.Cut(data, []byte(" "))
		n, err := strconv.ParseUint(string(length), 10, 31)
		if !ok || err != nil || n > uint64(len(data)) || int(n) <= len(length)+1 || data[n-1] != '\n' {
			return nil, tarError("a PAX record that is cut off")
		}
		key, value, ok := strings.Cut(string(data[len(length)+1:n-1]), "=")
		if !ok || key == "" || strings.IndexByte(key, 0) >= 0 || strings.IndexByte(value, 0) >= 0 && (key == "path" || key == "linkpath") {
			return nil, tarError("a PAX record without a key, or with a name that ends early")
		}
		records[key] = value
		data = data[n:]
	}
	return records, nil
}

// tarText returns a field up to its first NUL. A field that is full has none.
func tarText(b []byte) string {
	before, _, _ := bytes.Cut(b, []byte{0})
	return string(before)
}

// tarNumber reads a number field: octal digits between spaces, or GNU's base 256, whose first byte
// is 0x80. All known programs read these two forms alike, and differ about any other. An empty
// field means 0. Negative numbers in base 256 begin with 0xff and are refused, since no size is
// negative.
func tarNumber(b []byte) (int64, error) {
	if b[0] == 0x80 {
		for _, c := range b[1 : len(b)-8] {
			if c != 0 {
				return 0, tarError("a number above 2^63")
			}
		}
		if n := binary.BigEndian.Uint64(b[len(b)-8:]); len(b) > 8 && n <= math.MaxInt64 {
			return int64(n), nil
		}
		return 0, tarError("a number above 2^63")
	}
	digits := strings.TrimRight(strings.TrimLeft(string(b), " "), " \x00")
	if digits == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(digits, 8, 63)
	if err != nil {
		return 0, tarError("a number that is not octal")
	}
	return int64(n), nil
}

// tarError says that the archive has something that programs read in different ways.
func tarError(what string) error { return fmt.Errorf("%w: %s", tar.ErrHeader, what) }

// cutOff turns [io.EOF] into [io.ErrUnexpectedEOF]. It is for reads that must not meet the end of
// the stream. Otherwise readArchive would take the EOF for the end of the archive.
func cutOff(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
