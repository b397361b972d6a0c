package ocilocal

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// encoding/json accepts documents that two readers can understand differently: it ignores the case
// of field names, lets the last of several equal keys win, replaces invalid UTF-8, and leaves a
// field as it is for null. The bytes of a manifest are hashed once and read by many programs. A
// document that means one thing to a security scanner and another to a runtime would be an attack.
// So a document that has two readings is refused here, before encoding/json sees it.
//
// The check is one pass over the bytes:
//
//	checkJSON ──▶ value ──┬─▶ object ──▶ key, field, value …   duplicate keys, case, required
//	                      ├─▶ array  ──▶ value …
//	                      ├─▶ text                             surrogates
//	                      └─▶ numbers and literals             range of integers
//
// A jsonType goes down with it and says which fields are known. Below an unknown field it is nil,
// and then only the rules that hold for any JSON are checked.

// maxJSONInteger is the largest integer that every JSON reader keeps exactly (RFC 8259, section 6).
const maxJSONInteger = 1<<53 - 1

// A jsonType says what a value must be. The nil type accepts any value.
type jsonType struct {
	kind   byte        // '"' string, '0' integer, '[' array, '{' object
	fields []jsonField // the known fields of an object, at most 16; others may have any value
	elem   *jsonType   // the type of an array's elements, or of the values in a map
}

// A jsonField is a known field of an object. A null there counts as absent.
type jsonField struct {
	name     string
	typ      *jsonType
	required bool
}

// fieldSet has bit i set for field i of a jsonType.
type fieldSet uint16

// jsonKinds names each kind for messages.
var jsonKinds = map[byte]string{'"': "a string", '0': "an integer from 0 to 2^53-1", '[': "an array", '{': "an object"}

// The documents whose fields this package reads (image-spec manifest.md, image-index.md,
// descriptor.md and image-layout.md). All manifest forms are one type: in an image manifest, the
// key "Manifests" is as dangerous as "manifests", and both must be noticed.
var (
	jsonString = &jsonType{kind: '"'}
	jsonInt    = &jsonType{kind: '0'}
	jsonTexts  = &jsonType{kind: '[', elem: jsonString}
	jsonMap    = &jsonType{kind: '{', elem: jsonString}

	jsonPlatform = &jsonType{kind: '{', fields: []jsonField{
		{name: "architecture", typ: jsonString},
		{name: "os", typ: jsonString},
		{name: "os.version", typ: jsonString},
		{name: "os.features", typ: jsonTexts},
		{name: "variant", typ: jsonString},
	}}
	jsonDescriptor = &jsonType{kind: '{', fields: []jsonField{
		{name: "mediaType", typ: jsonString, required: true},
		{name: "digest", typ: jsonString, required: true},
		{name: "size", typ: jsonInt, required: true},
		{name: "annotations", typ: jsonMap},
		{name: "urls", typ: jsonTexts},
		{name: "data", typ: jsonString},
		{name: "platform", typ: jsonPlatform},
		{name: "artifactType", typ: jsonString},
	}}
	jsonDescriptors = &jsonType{kind: '[', elem: jsonDescriptor}
	jsonManifest    = &jsonType{kind: '{', fields: []jsonField{
		{name: "schemaVersion", typ: jsonInt},
		{name: "mediaType", typ: jsonString},
		{name: "artifactType", typ: jsonString},
		{name: "config", typ: jsonDescriptor},
		{name: "layers", typ: jsonDescriptors},
		{name: "blobs", typ: jsonDescriptors},
		{name: "manifests", typ: jsonDescriptors},
		{name: "subject", typ: jsonDescriptor},
		{name: "annotations", typ: jsonMap},
	}}
	jsonLayout = &jsonType{kind: '{', fields: []jsonField{
		{name: "imageLayoutVersion", typ: jsonString, required: true},
	}}
)

// decodeStrict decodes raw into v after [checkJSON] has accepted it. The error matches no sentinel:
// the caller knows what kind of document it is, and wraps it. The caller has bounded len(raw).
// Memory stays within a small multiple of that.
func decodeStrict(raw []byte, t *jsonType, v any) (present fieldSet, err error) {
	if present, err = checkJSON(raw, t); err != nil {
		return 0, err
	}
	return present, json.Unmarshal(raw, v)
}

// checkJSON refuses raw unless it is one JSON value of type t (RFC 8259) in
// valid UTF-8 without a byte order mark, at most [MaxJSONDepth] deep, with
//
//   - no key twice in any object, compared after undoing escapes;
//   - no key that differs only in case from a known field of its object;
//   - known fields, array elements and map values of their type, and null only for a known field;
//   - integers of known fields from 0 to 2^53−1, written without fraction or exponent;
//   - all required fields;
//   - no unpaired surrogate escapes, which have no faithful decoding (RFC 8259, section 8.2).
//
// It returns which known fields the outermost object has, nulls included.
func checkJSON(raw []byte, t *jsonType) (fieldSet, error) {
	if bytes.HasPrefix(raw, []byte("\xef\xbb\xbf")) {
		return 0, &jsonError{text: "byte order mark before the JSON document"}
	}
	if !utf8.Valid(raw) {
		return 0, &jsonError{text: "JSON document is not valid UTF-8"}
	}
	if !json.Valid(raw) {
		return 0, json.Unmarshal(raw, new(struct{})) // its error says where the syntax is wrong
	}
	s := jsonScanner{raw: raw, keys: make([][]byte, 0, 32)}
	s.space()
	if err := s.value(t, 1); err != nil {
		return 0, err
	}
	return s.root, nil
}

// A jsonError says what is wrong with a document, and where.
type jsonError struct {
	path string // like "layers[3].size"; empty for the whole document
	text string
	pos  int
}

func (e *jsonError) Error() string {
	if e.path == "" {
		return fmt.Sprintf("%s (at byte %d)", e.text, e.pos)
	}
	return fmt.Sprintf("%s: %s (at byte %d)", strings.TrimPrefix(e.path, "."), e.text, e.pos)
}

// under adds an outer step to the path, as long as the path stays fit for a message.
func (e *jsonError) under(step string) *jsonError {
	switch {
	case len(e.path) < 100:
		e.path = step + e.path
	case !strings.HasPrefix(e.path, "…"):
		e.path = "…" + e.path
	}
	return e
}

// keyStep prints a key as a step of a path.
func keyStep(key []byte) string {
	for _, c := range key {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '.' {
			return fmt.Sprintf("[%q]", boundText(string(key))) // bare digits would be an index
		}
	}
	return "." + printable(string(key))
}

// A jsonScanner walks raw. That is valid JSON (see json.Valid in checkJSON), so no position needs
// a check against the end, and every separator is where it must be. MaxJSONDepth bounds the
// recursion.
type jsonScanner struct {
	raw  []byte
	pos  int
	keys [][]byte // the keys so far of all open objects, innermost last: one slice for all of them
	root fieldSet
}

func (s *jsonScanner) fail(format string, args ...any) *jsonError {
	return &jsonError{text: fmt.Sprintf(format, args...), pos: s.pos}
}

// space skips white space and returns the byte after it.
func (s *jsonScanner) space() byte {
	for {
		switch c := s.raw[s.pos]; c {
		case ' ', '\t', '\n', '\r':
			s.pos++
		default:
			return c
		}
	}
}

// value scans the value that starts at the position.
func (s *jsonScanner) value(t *jsonType, depth int) *jsonError {
	c := s.raw[s.pos]
	kind := c
	if c == '-' || '0' <= c && c <= '9' {
		kind = '0'
	}
	if t != nil && kind != t.kind {
		return s.fail("not %s", jsonKinds[t.kind])
	}
	if depth > MaxJSONDepth && (c == '{' || c == '[') {
		return s.fail("nested more than %d deep", MaxJSONDepth)
	}
	switch c {
	case '"':
		_, err := s.text()
		return err
	case '{':
		return s.object(t, depth)
	case '[':
		return s.array(t, depth)
	}
	start := s.pos
	for s.pos < len(s.raw) && strings.IndexByte(",]} \t\r\n", s.raw[s.pos]) < 0 {
		s.pos++
	}
	if t != nil { // an integer that this package reads
		if n, err := strconv.ParseUint(string(s.raw[start:s.pos]), 10, 64); err != nil || n > maxJSONInteger {
			s.pos = start
			return s.fail("not %s", jsonKinds['0'])
		}
	}
	return nil
}

// array scans the array that starts at the position.
func (s *jsonScanner) array(t *jsonType, depth int) *jsonError {
	var elem *jsonType
	if t != nil {
		elem = t.elem
	}
	for i := 0; ; i++ {
		s.pos++ // the '[' or a ','
		if s.space() != ']' {
			if err := s.value(elem, depth+1); err != nil {
				return err.under("[" + strconv.Itoa(i) + "]")
			}
		}
		if s.space() == ']' {
			s.pos++
			return nil
		}
	}
}

// object scans the object that starts at the position.
func (s *jsonScanner) object(t *jsonType, depth int) *jsonError {
	base := len(s.keys)
	var present, filled fieldSet
	for {
		s.pos++ // the '{' or a ','
		if s.space() == '}' {
			break
		}
		key, err := s.key()
		if err != nil {
			return err
		}
		s.keys = append(s.keys, key)
		typ, bit, err := s.field(t, key)
		if err != nil {
			return err
		}
		present |= bit
		s.space()
		s.pos++ // the ':'
		if s.space() == 'n' && bit != 0 {
			s.pos += len("null")
		} else {
			filled |= bit
			if err := s.value(typ, depth+1); err != nil {
				return err.under(keyStep(key))
			}
		}
		if s.space() == '}' {
			break
		}
	}
	if twice := repeated(s.keys[base:]); twice != nil {
		return s.fail("duplicate key %s", printable(string(twice)))
	}
	s.keys = s.keys[:base]
	if t != nil {
		for i := range t.fields {
			if t.fields[i].required && filled&(1<<i) == 0 {
				return s.fail("missing").under("." + t.fields[i].name)
			}
		}
	}
	s.pos++
	if depth == 1 {
		s.root = present
	}
	return nil
}

// field returns the type for the value under key in an object of type t, and
// the bit of the known field that it is, if it is one.
func (s *jsonScanner) field(t *jsonType, key []byte) (*jsonType, fieldSet, *jsonError) {
	if t == nil {
		return nil, 0, nil
	}
	for i := range t.fields {
		if t.fields[i].name == string(key) {
			return t.fields[i].typ, 1 << i, nil
		}
	}
	if t.fields == nil { // a map
		return t.elem, 0, nil
	}
	name := string(key)
	for _, f := range t.fields {
		if strings.EqualFold(name, f.name) { // what encoding/json does
			return nil, 0, s.fail("key %s is %s in another case", printable(name), f.name)
		}
	}
	return nil, 0, nil
}

// bit returns the bit of the known field name.
func (t *jsonType) bit(name string) fieldSet {
	return 1 << slices.IndexFunc(t.fields, func(f jsonField) bool { return f.name == name })
}

// repeated returns a key that occurs twice, or nil. It may reorder keys. Sorting many keys keeps the
// time at n log n: an object can have hundreds of thousands of them.
func repeated(keys [][]byte) []byte {
	if len(keys) > 16 {
		slices.SortFunc(keys, bytes.Compare)
		for i := 1; i < len(keys); i++ {
			if bytes.Equal(keys[i-1], keys[i]) {
				return keys[i]
			}
		}
		return nil
	}
	for i, key := range keys {
		for _, other := range keys[:i] {
			if bytes.Equal(key, other) {
				return key
			}
		}
	}
	return nil
}

// key scans a string and returns it without quotes and escapes; never nil.
func (s *jsonScanner) key() ([]byte, *jsonError) {
	start := s.pos
	escaped, err := s.text()
	switch token := s.raw[start:s.pos]; {
	case err != nil:
		return nil, err
	case escaped:
		var text string
		if err := json.Unmarshal(token, &text); err != nil {
			return nil, s.fail("key: %v", err)
		}
		return []byte(text), nil
	default:
		return token[1 : len(token)-1], nil
	}
}

// text scans a string and reports whether it has escapes.
func (s *jsonScanner) text() (escaped bool, err *jsonError) {
	for s.pos++; ; s.pos++ {
		switch s.raw[s.pos] {
		case '"':
			s.pos++
			return escaped, nil
		case '\\':
			escaped = true
			s.pos++
			if s.raw[s.pos] != 'u' {
				break
			}
			r := s.hex4()
			if utf16.IsSurrogate(r) {
				if s.raw[s.pos+1] != '\\' || s.raw[s.pos+2] != 'u' {
					return true, s.fail("unpaired surrogate in a string")
				}
				s.pos += 2
				if utf16.DecodeRune(r, s.hex4()) == utf8.RuneError {
					return true, s.fail("unpaired surrogate in a string")
				}
			}
		}
	}
}

// hex4 reads the four digits after the 'u' at the position, and stops at the last one.
func (s *jsonScanner) hex4() rune {
	n, _ := strconv.ParseUint(string(s.raw[s.pos+1:s.pos+5]), 16, 16)
	s.pos += 4
	return rune(n)
}
