package ocilocal

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha512"
	"database/sql"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A queryer runs queries: an index on any connection of its pool, or a transaction on its own
// connection. Functions that take a queryer are used inside and outside of transactions.
type queryer interface {
	// query returns rows. Until they are closed, they keep a connection of the pool, or that of the
	// transaction. Only [eachRow] calls it.
	query(ctx context.Context, text string, args []any) (*sql.Rows, error)
	// row reads at most one row into dest, and reports whether there was one.
	row(text string, args []any, dest ...any) (bool, error)
	// explain gives an error of SQLite its sentinel.
	explain(err error) error
}

// Rows are read in two steps, so that no query ever waits for another one's connection. With the
// rows open, a scan function turns each into a value, and does nothing else. When they are closed,
// a visit function gets the values, and may query and write. Four visitors that queried with their
// rows open could hold all connections of the pool, and each wait for a fifth.

// eachRow passes the rows of a query to scan, which must not query. ctx stops the query while it
// runs, except in a transaction.
func eachRow(ctx context.Context, q queryer, text string, args []any, scan func(*sql.Rows) error) error {
	rows, err := q.query(ctx, text, args)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := scan(rows); err != nil {
			return q.explain(err)
		}
	}
	return q.explain(rows.Err())
}

// readRows returns the rows of a query. expected is about how many there are, for the allocation.
// It never comes from outside.
func readRows[T any](ctx context.Context, q queryer, text string, expected int, args []any, scan func(*sql.Rows) (T, error)) ([]T, error) {
	all := make([]T, 0, expected)
	err := eachRow(ctx, q, text, args, func(rows *sql.Rows) error {
		v, err := scan(rows)
		if err == nil {
			all = append(all, v)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// A paging reads a query in pages. Each page is a statement that begins after the key of the last
// row. So however many rows there are, memory stays small, and no read transaction stays open,
// which would keep SQLite from shortening its log. Pages are not of one moment: a row that is
// written meanwhile is seen if its key comes later.
type paging[T any] struct {
	text string // the last argument is the limit of rows
	size int    // of a page
	scan func(*sql.Rows) (T, error)
	// after returns the arguments, except the limit, for the page that follows a row. They must
	// grow from page to page.
	after func(T) []any
}

// each calls visit with each row, beginning with the page that args ask for. An [errStop] of visit
// ends it without an error.
//
// Errors: those of visit, ctx and the index; [ErrCorruptIndex] for rows that are out of order.
func (p *paging[T]) each(ctx context.Context, q queryer, args []any, visit func(T) error) error {
	for expected := min(p.size, 8); ; expected = p.size { // most lists are short
		if err := ctx.Err(); err != nil {
			return err
		}
		page, err := readRows(ctx, q, p.text, expected, append(slices.Clone(args), p.size), p.scan)
		if err != nil {
			return err
		}
		for _, v := range page {
			if err := visit(v); err == errStop {
				return nil
			} else if err != nil {
				return err
			}
		}
		if len(page) < p.size {
			return nil
		}
		before := args
		if args = p.after(page[len(page)-1]); !ascends(before, args) {
			return errOutOfOrder
		}
	}
}

// errOutOfOrder ends a listing of a damaged index, which could otherwise never end.
var errOutOfOrder = fmt.Errorf("%w: its rows are out of order", ErrCorruptIndex)

// ascends reports whether a page's arguments are above those of the page before, compared like
// keys: the first that differs decides.
func ascends(before, after []any) bool {
	for i := range before {
		c := 0
		switch b := before[i].(type) {
		case string:
			c = strings.Compare(after[i].(string), b)
		case []byte:
			c = bytes.Compare(after[i].([]byte), b)
		case int:
			c = cmp.Compare(after[i].(int), b)
		case int64:
			c = cmp.Compare(after[i].(int64), b)
		}
		if c != 0 {
			return c > 0
		}
	}
	return false
}

// exists reports whether a query finds a row.
func exists(q queryer, text string, args ...any) (bool, error) {
	var one int
	return q.row(text, args, &one)
}

// digestAlgorithms are the algorithms in the index, each at the place that is its number there.
var digestAlgorithms = [...]digest.Algorithm{1: digest.SHA256, 2: digest.SHA384, 3: digest.SHA512}

// digestBytes returns a digest as the index stores it: one byte for the algorithm, then the hash.
// That is half as long as the text, and in the same order. For "" and anything else that is not a
// digest it returns no bytes, which are below and unequal to every digest. So a query finds no row
// for them.
func digestBytes(d digest.Digest) []byte {
	if checkDigest(d) != nil {
		return []byte{}
	}
	b, _ := hex.DecodeString(d.Encoded())
	return append([]byte{byte(slices.Index(digestAlgorithms[:], d.Algorithm()))}, b...)
}

// digestFromBytes returns the digest in a column. NULL is the digest of a row that is missing,
// which another row points at.
//
// Errors: [ErrCorruptIndex].
func digestFromBytes(b []byte) (digest.Digest, error) {
	if len(b) > 0 && 0 < b[0] && int(b[0]) < len(digestAlgorithms) {
		if alg := digestAlgorithms[b[0]]; len(b) == 1+alg.Size() {
			text := make([]byte, 0, len(digest.SHA512)+1+2*sha512.Size) // on the stack, for listings
			text = append(append(text, alg...), ':')
			return digest.Digest(hex.AppendEncode(text, b[1:])), nil
		}
	}
	if b == nil {
		return "", fmt.Errorf("%w: a row points at content that has no row", ErrCorruptIndex)
	}
	return "", fmt.Errorf("%w: %x is not a digest", ErrCorruptIndex, b[:min(len(b), 70)])
}

// rowDigest checks a digest that another program's index, or one of schema version 1, has as text.
func rowDigest(s string) (digest.Digest, error) {
	if err := checkDigest(digest.Digest(s)); err != nil {
		return "", fmt.Errorf("%w: %w", ErrCorruptIndex, err)
	}
	return digest.Digest(s), nil
}

// scanDigest reads a row that is one digest.
func scanDigest(rows *sql.Rows) (digest.Digest, error) {
	var b sql.RawBytes // only as long as the row
	if err := rows.Scan(&b); err != nil {
		return "", err
	}
	return digestFromBytes(b)
}

// scanIDDigest reads a row that is the id of a row of content, or of manifests, and its digest.
func scanIDDigest(rows *sql.Rows) (id int64, d digest.Digest, err error) {
	var b sql.RawBytes
	if err = rows.Scan(&id, &b); err == nil {
		d, err = digestFromBytes(b)
	}
	return id, d, err
}

// roles are the roles in the index, each at the place that is its number there.
var roles = [...]role{1: roleConfig, 2: roleLayer, 3: roleManifest}

// roleNumber returns the number of a role.
func roleNumber(r role) int { return slices.Index(roles[:], r) }

// numberedRole returns the role of a number. A number that is none, in a damaged row, becomes a
// role that differs from all others, so that comparisons fail and no code takes it for a layer.
func numberedRole(n int) role {
	if 0 < n && n < len(roles) {
		return roles[n]
	}
	return role(fmt.Sprintf("role %d", n))
}

// A descriptorRow takes the five columns that make a manifest's descriptor, the last a time. Its
// fields are what database/sql fills without reflection. In a damaged index any may be NULL.
type descriptorRow struct {
	mediaType, artifactType, size, micro any
	digest                               []byte
}

// dest returns the destinations for Scan, in the order of the columns.
func (d *descriptorRow) dest() []any {
	return []any{&d.mediaType, &d.digest, &d.size, &d.artifactType, &d.micro}
}

// value returns the descriptor and the time. Each column is checked: STRICT tables keep out wrong
// types, but not flipped bits.
func (d *descriptorRow) value() (desc ocispec.Descriptor, at time.Time, err error) {
	size, ok := d.size.(int64)
	micro, ok2 := d.micro.(int64)
	if !ok || !ok2 || size < 0 {
		return desc, at, fmt.Errorf("%w: size %v or time %v is not a number in its range", ErrCorruptIndex, d.size, d.micro)
	}
	mediaType, ok := d.mediaType.(string)
	artifactType, ok2 := d.artifactType.(string)
	if !ok || !ok2 {
		return desc, at, fmt.Errorf("%w: media type %v or artifact type %v is not a text", ErrCorruptIndex, d.mediaType, d.artifactType)
	}
	found, err := digestFromBytes(d.digest)
	if err != nil {
		return desc, at, err
	}
	desc = ocispec.Descriptor{MediaType: mediaType, Digest: found, Size: size, ArtifactType: artifactType}
	return desc, time.UnixMicro(micro), nil
}
