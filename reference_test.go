package ocilocal_test

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
	"github.com/opencontainers/go-digest"
)

const refSHA256 = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

var (
	refSHA384 = "sha384:" + strings.Repeat("3a", 48)
	refSHA512 = "sha512:" + strings.Repeat("5b", 64)
)

// goodReferences has spellings and their canonical parts.
var goodReferences = []struct {
	in                        string
	registry, repository, tag string
	digest                    string
}{
	// Docker Hub's short forms.
	{"alpine", "docker.io", "library/alpine", "latest", ""},
	{"alpine:3.20", "docker.io", "library/alpine", "3.20", ""},
	{"library/alpine", "docker.io", "library/alpine", "latest", ""},
	{"docker.io/alpine", "docker.io", "library/alpine", "latest", ""},
	{"docker.io/library/alpine", "docker.io", "library/alpine", "latest", ""},
	{"index.docker.io/alpine", "docker.io", "library/alpine", "latest", ""},
	{"index.docker.io/jitesoft/alpine", "docker.io", "jitesoft/alpine", "latest", ""},
	{"registry-1.docker.io/library/alpine:3", "docker.io", "library/alpine", "3", ""},
	{"Registry-1.Docker.IO/alpine", "docker.io", "library/alpine", "latest", ""},
	{"jitesoft/alpine", "docker.io", "jitesoft/alpine", "latest", ""},
	{"a/b/c", "docker.io", "a/b/c", "latest", ""},
	{"docker.io:443/alpine", "docker.io:443", "alpine", "latest", ""},
	// Without a '/' there is no host.
	{"localhost", "docker.io", "library/localhost", "latest", ""},
	{"ghcr.io", "docker.io", "library/ghcr.io", "latest", ""},
	{"app:99999", "docker.io", "library/app", "99999", ""},
	// Digest algorithms are names like others once the name is spelled out.
	{"docker.io/library/sha256:x", "docker.io", "library/sha256", "x", ""},
	{"sha256", "docker.io", "library/sha256", "latest", ""},

	// Hosts.
	{"ghcr.io/jij-inc/ommx/demo:v1", "ghcr.io", "jij-inc/ommx/demo", "v1", ""},
	{"GHCR.io/jij-inc/ommx", "ghcr.io", "jij-inc/ommx", "latest", ""},
	{"localhost/x", "localhost", "x", "latest", ""},
	{"LocalHost/x", "localhost", "x", "latest", ""},
	{"localhost:5000/test_repo:latest", "localhost:5000", "test_repo", "latest", ""},
	{"LOCALHOST:5000/x", "localhost:5000", "x", "latest", ""},
	{"registry:1/x", "registry:1", "x", "latest", ""},
	{"registry:65535/x", "registry:65535", "x", "latest", ""},
	{"registry.test/x", "registry.test", "x", "latest", ""},
	{"registry.test.evil.test/x", "registry.test.evil.test", "x", "latest", ""},
	{"xn--nxasmq6b.example/x", "xn--nxasmq6b.example", "x", "latest", ""},
	{"1password.1e100.net/x", "1password.1e100.net", "x", "latest", ""},
	{"127.0.0.1/x", "127.0.0.1", "x", "latest", ""},
	{"127.0.0.1:5000/x/y:z", "127.0.0.1:5000", "x/y", "z", ""},
	{"[::1]/x", "[::1]", "x", "latest", ""},
	{"[::1]:5000/x:v1", "[::1]:5000", "x", "v1", ""},
	{"[0:0::0001]:5000/x:v1", "[::1]:5000", "x", "v1", ""},
	{"[2001:DB8:0:0:0:0:0:A]/x@" + refSHA256, "[2001:db8::a]", "x", "", refSHA256},
	{strings.Repeat("a", 63) + "." + strings.Repeat("b.", 94) + "c/x", strings.Repeat("a", 63) + "." + strings.Repeat("b.", 94) + "c", "x", "latest", ""},

	// Repositories.
	{"h.io/0", "h.io", "0", "latest", ""},
	{"h.io/a.b_c__d-e---f/g", "h.io", "a.b_c__d-e---f/g", "latest", ""},
	{"h.io/" + strings.Repeat("a", 250), "h.io", strings.Repeat("a", 250), "latest", ""},
	{"index.docker.io/" + strings.Repeat("a", 237), "docker.io", "library/" + strings.Repeat("a", 237), "latest", ""},

	// Tags and digests.
	{"h.io/a:_", "h.io", "a", "_", ""},
	{"h.io/a:V1.2-rc_3", "h.io", "a", "V1.2-rc_3", ""},
	{"h.io/a:1..--", "h.io", "a", "1..--", ""},
	{"h.io/a:" + strings.Repeat("Z", 128), "h.io", "a", strings.Repeat("Z", 128), ""},
	{"example.com/foo:my__tag", "example.com", "foo", "my__tag", ""},
	{"alpine@" + refSHA256, "docker.io", "library/alpine", "", refSHA256},
	{"h.io/a@" + refSHA384, "h.io", "a", "", refSHA384},
	{"h.io/a@" + refSHA512, "h.io", "a", "", refSHA512},
	{"h.io/a:v1@" + refSHA256, "h.io", "a", "v1", refSHA256},
	{"h.io:80/a:latest@" + refSHA512, "h.io:80", "a", "latest", refSHA512},
}

func TestParseReference(t *testing.T) {
	for _, tt := range goodReferences {
		r, err := ocilocal.ParseReference(tt.in)
		if err != nil {
			t.Errorf("ParseReference(%q): %v", tt.in, err)
			continue
		}
		if r.Registry() != tt.registry || r.Repository() != tt.repository || r.Tag() != tt.tag || r.Digest().String() != tt.digest {
			t.Errorf("ParseReference(%q) = %q %q %q %q, want %q %q %q %q", tt.in,
				r.Registry(), r.Repository(), r.Tag(), r.Digest(), tt.registry, tt.repository, tt.tag, tt.digest)
		}
		if want := tt.registry + "/" + tt.repository; r.Name() != want {
			t.Errorf("ParseReference(%q).Name() = %q, want %q", tt.in, r.Name(), want)
		}
		want := tt.registry + "/" + tt.repository
		if tt.tag != "" {
			want += ":" + tt.tag
		}
		if tt.digest != "" {
			want += "@" + tt.digest
		}
		if r.String() != want {
			t.Errorf("ParseReference(%q).String() = %q, want %q", tt.in, r, want)
		}
		if r.IsZero() {
			t.Errorf("ParseReference(%q) is zero", tt.in)
		}
		if again := ocilocal.MustParseReference(r.String()); again != r {
			t.Errorf("ParseReference(%q) = %#v, want %#v", r, again, r)
		}
	}
}

func TestParseReferenceRefuses(t *testing.T) {
	long := strings.Repeat("a", 256)
	tests := []struct {
		in    string
		quote string // what the message has to name
		rule  string // and what it has to say of it
	}{
		{"", "", "empty"},
		{"h.io/" + strings.Repeat("a/", 510), `h.io/a/a`, "1025 bytes"},
		{strings.Repeat("\x00", 1<<20), `"\x00\x00`, "1048576 bytes"},

		// Only a digest.
		{refSHA256, refSHA256, "only a digest"},
		{"sha512:abc", `sha512:abc`, "only a digest"},
		{strings.TrimPrefix(refSHA256, "sha256:"), refSHA256[7:], "only a digest"},
		{"@" + refSHA256, `repository ""`, "empty"},

		// Bytes that no part has.
		{"alp\nine", `"\n"`, "at byte 3"},
		{"alpine\n", `"\n"`, "at byte 6"},
		{" alpine", `" "`, "without spaces"},
		{"h.io/a:\x1b[31m", `"\x1b"`, "control characters"},
		{"h.io/a\x00", `"\x00"`, "at byte 6"},
		{"h.io/a\x7f", `"\x7f"`, "ASCII"},
		{"h.io/a\xff", `"\xff"`, "ASCII"},
		{"\u0430lpine", `"\u0430"`, "ASCII"},           // Cyrillic a
		{"h.io/\u212aite", `"\u212a"`, "ASCII"},        // Kelvin sign: lower-cases to k
		{"localho\u017ft/x", `"\u017f"`, "ASCII"},      // long s: folds to s
		{"h.io\u2215a/x", `"\u2215"`, "ASCII"},         // division slash
		{"h.io/a\u202egnp", `"\u202e"`, "ASCII"},       // right-to-left override
		{"b\u00fccher.example/x", `"\u00fc"`, "ASCII"}, // only as xn--
		{"h.io/a%2fb", `"%"`, "at byte 1"},
		{"h.io/a%2e%2e", `"%"`, "lower-case letters"},
		{`h.io/a\b`, `"\\"`, "lower-case letters"},
		{"h.io/a?b", `"?"`, "lower-case letters"},
		{"h.io/a#b", `"#"`, "lower-case letters"},

		// Repositories.
		{"Alpine", `"A"`, "lower-case"},
		{"h.io/Foo/bar", `repository Foo/bar has "F"`, "at byte 0"},
		{"HOST/foo", `"H"`, "lower-case"}, // not a host: no '.', no ':'
		{"h.io/", `repository ""`, "empty"},
		{"/a", `"/"`, "at byte 0"},
		{"/", `"/"`, "at byte 0"},
		{"h.io/a/", `ends in "/"`, "lower-case letters"},
		{"h.io//a", `"/"`, "at byte 0"},
		{"h.io/a//b", `"/"`, "at byte 2"},
		{"h.io/..", `repository ..`, "at byte 0"},
		{"h.io/../../etc/passwd", `repository ../../etc/passwd`, "at byte 0"},
		{"h.io/a/../b", `"."`, "at byte 2"},
		{"h.io/a..b", `"."`, "at byte 2"},
		{"../a", `host ..`, "labels"},
		{"./a", `host .`, "labels"},
		{"h.io/.a", `"."`, "at byte 0"},
		{"h.io/a.", `ends in "."`, "lower-case letters"},
		{"h.io/-a", `"-"`, "at byte 0"},
		{"h.io/a-", `ends in "-"`, "lower-case letters"},
		{"h.io/_a", `"_"`, "at byte 0"},
		{"h.io/a__", `ends in "_"`, "lower-case letters"},
		{"h.io/a___b", `"_"`, "at byte 3"},
		{"h.io/a-_b", `"_"`, "at byte 2"},
		{"h.io/a/-b", `"-"`, "at byte 2"},
		{"h.io/" + long, `h.io/aaa`, "at most 255"},
		{"h.io/" + long[:251], `h.io/aaa`, "256 characters"},
		{"index.docker.io/" + long[:238], `docker.io/library/aaa`, "256 characters"},

		// Hosts.
		{"host:99999/x", `port 99999`, "65535"},
		{"host:65536/x", `port 65536`, "65535"},
		{"host:0/x", `port 0`, "1 to 65535"},
		{"host:/x", `""`, "1 to 65535"},
		{"host:0443/x", `port 0443`, "leading zeros"},
		{"host:-1/x", `port -1`, "1 to 65535"},
		{"host:+80/x", `port +80`, "1 to 65535"},
		{"host:8a/x", `port 8a`, "1 to 65535"},
		{"host:18446744073709551617/x", `port 18446744073709551617`, "1 to 65535"},
		{"host:80:80/x", `port 80:80`, "1 to 65535"},
		{":80/x", `""`, "labels"},
		{"https://h.io/x", `"https:"`, "scheme"},
		{"http://h.io/x", `"http:"`, "scheme"},
		{"oci://h.io/x", `""`, "1 to 65535"},
		{".h.io/x", `.h.io`, "labels"},
		{"h.io./x", `h.io.`, "labels"},
		{"h..io/x", `h..io`, "labels"},
		{"-h.io/x", `label -h,`, "labels"},
		{"h-.io/x", `label h-,`, "labels"},
		{"my_host:5000/x", `"_"`, "at byte 2"},
		{"h.io%2fx/y", `"%"`, "at byte 4"},
		{strings.Repeat("a.", 126) + "aa/x", `a.a.`, "at most 253"},
		{"127.1/x", `host 127.1 `, "IPv4"},
		{"127.0.0.256/x", `127.0.0.256`, "IPv4"},
		{"0177.0.0.1/x", `0177.0.0.1`, "IPv4"},
		{"2130706433:5000/x", `2130706433`, "IPv4"},
		{"0X7F000001:5000/x", `0x7f000001`, "IPv4"},
		{"::1/x", `port :1`, "1 to 65535"},
		{"[::1/x", `[::1`, "IPv6"},
		{"[]/x", `[]`, "IPv6"},
		{"[127.0.0.1]/x", `[127.0.0.1]`, "IPv6"},
		{"[::ffff:127.0.0.1]/x", `[::ffff:127.0.0.1]`, "IPv4"},
		{"[fe80::1%eth0]/x", `[fe80::1%eth0]`, "zone"},
		{"[::1]5000/x", `has 5000`, "port"},
		{"[::1]:0/x", `port 0`, "1 to 65535"},
		{"[::1]:/x", `""`, "1 to 65535"},
		{"[::1]", `"["`, "lower-case letters"},

		// Tags.
		{"alpine:", `tag ""`, "empty"},
		{"h.io/a:" + long[:129], `aaa`, "at most 128"},
		{"h.io/a:.x", `"."`, "at byte 0"},
		{"h.io/a:-x", `"-"`, "at byte 0"},
		{"h.io/a:v1+2", `"+"`, "at byte 2"},
		{"h.io/a:v1:v2", `tag v1:v2`, "'@'"},
		{"quay.io/a/b:" + refSHA256, refSHA256, "'@'"}, // as OMMX v2 wrote it
		{"h.io/a:@" + refSHA256, `tag ""`, "empty"},
	}
	for _, tt := range tests {
		r, err := ocilocal.ParseReference(tt.in)
		if err == nil {
			t.Errorf("ParseReference(%.300q) = %q, want an error", tt.in, r)
			continue
		}
		if !r.IsZero() {
			t.Errorf("ParseReference(%.300q) gives %q beside its error", tt.in, r)
		}
		if !errors.Is(err, ocilocal.ErrInvalidReference) || errors.Is(err, ocilocal.ErrInvalidDigest) {
			t.Errorf("ParseReference(%.300q): %v, want ErrInvalidReference alone", tt.in, err)
		}
		if msg := err.Error(); !strings.Contains(msg, tt.quote) || !strings.Contains(msg, tt.rule) {
			t.Errorf("ParseReference(%.300q): %q, want %s and %s in it", tt.in, msg, tt.quote, tt.rule)
		}
		checkReferenceMessage(t, err)
	}
}

func TestParseReferenceRefusesDigest(t *testing.T) {
	for _, d := range []string{
		"",
		"e3b0",
		refSHA256[:len(refSHA256)-1],
		refSHA256 + "0",
		strings.ToUpper(refSHA256),
		"sha256:" + strings.ToUpper(refSHA256[7:]),
		"sha256:../../x",
		"sha256:" + strings.Repeat("/", 64),
		"md5:d41d8cd98f00b204e9800998ecf8427e",
		"sha256:" + refSHA256,
		refSHA256 + "@" + refSHA256,
		refSHA256 + ":v1",
		"h.io/user",
	} {
		_, err := ocilocal.ParseReference("h.io/a@" + d)
		if !errors.Is(err, ocilocal.ErrInvalidReference) || !errors.Is(err, ocilocal.ErrInvalidDigest) {
			t.Errorf("digest %q: %v, want ErrInvalidReference and ErrInvalidDigest", d, err)
			continue
		}
		if shown := cmp.Or(d, `""`); !strings.Contains(err.Error(), "invalid digest "+shown+": ") {
			t.Errorf("digest %q: %q does not show it", d, err)
		}
		checkReferenceMessage(t, err)
	}
}

// checkReferenceMessage fails if a terminal or a log could misread the message.
func checkReferenceMessage(t *testing.T, err error) {
	t.Helper()
	msg := err.Error()
	for i := range len(msg) {
		if msg[i] < ' ' || msg[i] == 0x7f {
			t.Fatalf("message has a raw control character: %q", msg)
		}
	}
	if len(msg) > 1500 {
		t.Errorf("message has %d bytes: %.300q…", len(msg), msg)
	}
}

func TestMustParseReferencePanics(t *testing.T) {
	defer func() {
		if msg, _ := recover().(string); !strings.Contains(msg, `"A"`) {
			t.Errorf("panic with %q, want the parser's error", msg)
		}
	}()
	ocilocal.MustParseReference("Alpine")
}

func TestGitHubReference(t *testing.T) {
	r, err := ocilocal.GitHubReference("Jij-Inc", "OMMX", "Demo/Sub", "V1")
	if err != nil {
		t.Fatal(err)
	}
	if want := "ghcr.io/jij-inc/ommx/demo/sub:V1"; r.String() != want {
		t.Errorf("got %q, want %q", r, want)
	}
	if r != ocilocal.MustParseReference(r.String()) {
		t.Errorf("%q is not equal to its parsed spelling", r)
	}
	for _, bad := range [][4]string{
		{"", "r", "n", "t"},
		{"o", "", "n", "t"},
		{"o", "r", "", "t"},
		{"o", "r", "n", ""},
		{"o/x", "r", "n", "t"},
		{"o", "..", "n", "t"},
		{"o", "r/../x", "n", "t"},
		{"o", "r", "../n", "t"},
		{"o", "r", "n:t", "t"},
		{"o", "r", "n", "t@" + refSHA256},
		{"o", "r", "n", "t:u"},
		{"o\n", "r", "n", "t"},
		{"\u212aite", "r", "n", "t"},
		{strings.Repeat("o", 1<<20), "r", "n", "t"},
	} {
		r, err := ocilocal.GitHubReference(bad[0], bad[1], bad[2], bad[3])
		if !errors.Is(err, ocilocal.ErrInvalidReference) {
			t.Errorf("GitHubReference(%.100q) = %q, %v, want ErrInvalidReference", bad, r, err)
			continue
		}
		checkReferenceMessage(t, err)
	}
}

func TestReferenceWith(t *testing.T) {
	both := ocilocal.MustParseReference("h.io/a:v1@" + refSHA256)

	r, err := both.WithTag("v2")
	if want := ocilocal.MustParseReference("h.io/a:v2"); err != nil || r != want {
		t.Errorf("WithTag = %q, %v, want %q", r, err, want)
	}
	r, err = both.WithDigest(digest.Digest(refSHA512))
	if want := ocilocal.MustParseReference("h.io/a@" + refSHA512); err != nil || r != want {
		t.Errorf("WithDigest = %q, %v, want %q", r, err, want)
	}

	for _, tag := range []string{"", "a/b", "a:b", "a@b", "-", "a\x1b", strings.Repeat("x", 129)} {
		r, err := both.WithTag(tag)
		if !errors.Is(err, ocilocal.ErrInvalidReference) || !r.IsZero() {
			t.Errorf("WithTag(%q) = %q, %v, want ErrInvalidReference", tag, r, err)
			continue
		}
		checkReferenceMessage(t, err)
	}
	r, err = both.WithDigest("sha256:x")
	if !errors.Is(err, ocilocal.ErrInvalidReference) || !errors.Is(err, ocilocal.ErrInvalidDigest) || !r.IsZero() {
		t.Errorf("WithDigest = %q, %v, want ErrInvalidReference and ErrInvalidDigest", r, err)
	}

	var zero ocilocal.Reference
	if r, err := zero.WithTag("v1"); !errors.Is(err, ocilocal.ErrInvalidReference) || !r.IsZero() {
		t.Errorf("zero.WithTag = %q, %v, want ErrInvalidReference", r, err)
	}
	if r, err := zero.WithDigest(refSHA256); !errors.Is(err, ocilocal.ErrInvalidReference) || !r.IsZero() {
		t.Errorf("zero.WithDigest = %q, %v, want ErrInvalidReference", r, err)
	}
}

func TestReferenceCompare(t *testing.T) {
	refs := []ocilocal.Reference{{}}
	for _, tt := range goodReferences {
		refs = append(refs, ocilocal.MustParseReference(tt.in))
	}
	for _, a := range refs {
		for _, b := range refs {
			ab := a.Compare(b)
			if ab != -b.Compare(a) {
				t.Errorf("%q and %q: not antisymmetric", a, b)
			}
			if (ab == 0) != (a == b) {
				t.Errorf("%q and %q: Compare is %d, == is %t", a, b, ab, a == b)
			}
			for _, c := range refs {
				if ab <= 0 && b.Compare(c) <= 0 && a.Compare(c) > 0 {
					t.Errorf("%q, %q, %q: not transitive", a, b, c)
				}
			}
		}
	}

	// The index's order: by name, then by the tag or digest, as bytes.
	want := []string{
		"",
		"h.io/a:V",
		"h.io/a:latest",
		"h.io/a@" + refSHA256,
		"h.io/a:v1",
		"h.io/a:v1@" + refSHA256,
		"h.io/a:v10",
		"h.io/a:v2",
		"h.io/a-b:latest", // not by the spelling, where '-' is before ':'
	}
	var got []ocilocal.Reference
	for _, s := range slices.Backward(want) {
		if s == "" {
			got = append(got, ocilocal.Reference{})
		} else {
			got = append(got, ocilocal.MustParseReference(s))
		}
	}
	slices.SortFunc(got, ocilocal.Reference.Compare)
	for i, r := range got {
		if r.String() != want[i] {
			t.Errorf("at %d: %q, want %q", i, r, want[i])
		}
	}
}

func TestReferenceText(t *testing.T) {
	type document struct {
		Ref  ocilocal.Reference
		None ocilocal.Reference
		Omit ocilocal.Reference `json:",omitzero"`
		Map  map[ocilocal.Reference]int
	}
	in := document{
		Ref: ocilocal.MustParseReference("alpine:3.20@" + refSHA256),
		Map: map[ocilocal.Reference]int{ocilocal.MustParseReference("alpine"): 1},
	}
	raw, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"Ref":"docker.io/library/alpine:3.20@` + refSHA256 + `","None":"","Map":{"docker.io/library/alpine:latest":1}}`
	if string(raw) != want {
		t.Errorf("marshalled %s, want %s", raw, want)
	}
	out := document{None: in.Ref}
	if err := json.Unmarshal(raw, &out); err != nil {
		t.Fatal(err)
	}
	if out.Ref != in.Ref || !out.None.IsZero() || out.Map[ocilocal.MustParseReference("docker.io/alpine:latest")] != 1 {
		t.Errorf("unmarshalled %+v, want %+v", out, in)
	}

	before := out.Ref
	err = json.Unmarshal([]byte(`{"Ref":"Alpine"}`), &out)
	if !errors.Is(err, ocilocal.ErrInvalidReference) {
		t.Errorf("unmarshalling a bad reference: %v, want ErrInvalidReference", err)
	}
	if out.Ref != before {
		t.Errorf("a failed unmarshal left %q, want %q", out.Ref, before)
	}
}

func TestReferenceKey(t *testing.T) {
	for _, tt := range goodReferences {
		r := ocilocal.MustParseReference(tt.in)
		name, reference := ocilocal.ReferenceKey(r)
		if want := cmp.Or(tt.tag, tt.digest); name != r.Name() || reference != want {
			t.Errorf("key of %q is %q, %q, want %q, %q", r, name, reference, r.Name(), want)
		}
		got, err := ocilocal.ReferenceFromKey(name, reference)
		if err != nil {
			t.Errorf("referenceFromKey(%q, %q): %v", name, reference, err)
			continue
		}
		want := r
		if r.Tag() != "" && r.Digest() != "" {
			want, _ = r.WithTag(r.Tag()) // the key of a ref is its tag
		}
		if got != want {
			t.Errorf("referenceFromKey(%q, %q) = %q, want %q", name, reference, got, want)
		}
	}
	if name, reference := ocilocal.ReferenceKey(ocilocal.Reference{}); name != "" || reference != "" {
		t.Errorf("key of the zero reference is %q, %q", name, reference)
	}
}

func TestReferenceFromKeyRefuses(t *testing.T) {
	for _, tt := range []struct{ name, reference string }{
		{"", ""},
		{"", "v1"},
		{"h.io/a", ""},
		{"h.io/a", "a/b"},
		{"h.io/a", "v1\n"},
		{"h.io/a", strings.Repeat("x", 129)},
		{"h.io/a", "v1@" + refSHA256},
		{"h.io/a\x00", "v1"},
		{"h.io/\u212a", "v1"},
		{"localho\u017ft/a", "v1"},
		{"h.io/../a", "v1"},
		{"h.io/a:v1", "v1"},
		{"h.io", "v1"},
		{"h.io/" + strings.Repeat("a", 251), "v1"},
		{"h.io/" + strings.Repeat("a", 1<<20), "v1"},
		// Names that no look-up asks for.
		{"alpine", "v1"},
		{"library/alpine", "v1"},
		{"docker.io/alpine", "v1"},
		{"index.docker.io/library/alpine", "v1"},
		{"H.io/a", "v1"},
		{"Localhost/a", "v1"},
		{"[0::1]/a", "v1"},
	} {
		r, err := ocilocal.ReferenceFromKey(tt.name, tt.reference)
		if !errors.Is(err, ocilocal.ErrInvalidReference) || !r.IsZero() {
			t.Errorf("referenceFromKey(%.100q, %q) = %q, %v, want ErrInvalidReference", tt.name, tt.reference, r, err)
			continue
		}
		checkReferenceMessage(t, err)
	}
	for _, d := range []string{"sha256:x", "md5:d41d8cd98f00b204e9800998ecf8427e", strings.ToUpper(refSHA256), ":"} {
		_, err := ocilocal.ReferenceFromKey("h.io/a", d)
		if !errors.Is(err, ocilocal.ErrInvalidReference) || !errors.Is(err, ocilocal.ErrInvalidDigest) {
			t.Errorf("referenceFromKey(_, %q): %v, want ErrInvalidReference and ErrInvalidDigest", d, err)
		}
	}
}

func TestIsBareTag(t *testing.T) {
	for s, want := range map[string]bool{
		"v1": true, "latest": true, "_": true, "A.b-C_9": true, strings.Repeat("x", 128): true,
		"": false, ".": false, "..": false, "-x": false, "a/b": false, "a:b": false, "a@b": false,
		"a b": false, "a\x1b": false, "\u00e9": false, strings.Repeat("x", 129): false,
	} {
		if got := ocilocal.IsBareTag(s); got != want {
			t.Errorf("isBareTag(%q) = %t, want %t", s, got, want)
		}
		if err := ocilocal.CheckTag(s); (err == nil) != want || err != nil && !errors.Is(err, ocilocal.ErrInvalidReference) {
			t.Errorf("checkTag(%q) = %v, want ok %t", s, err, want)
		}
	}
}

// TestReferenceAllocations: parsing a key does not allocate, since a listing parses one for each
// row.
func TestReferenceAllocations(t *testing.T) {
	for _, tt := range []struct {
		what string
		most float64
		f    func()
	}{
		{"ParseReference of a full name", 0, func() { _, _ = ocilocal.ParseReference("ghcr.io/jij-inc/ommx/demo:v1") }},
		{"ParseReference of a short name", 1, func() { _, _ = ocilocal.ParseReference("alpine") }},
		{"referenceFromKey with a tag", 0, func() { _, _ = ocilocal.ReferenceFromKey("ghcr.io/jij-inc/ommx/demo", "v1") }},
		{"referenceFromKey with a digest", 0, func() { _, _ = ocilocal.ReferenceFromKey("ghcr.io/jij-inc/ommx/demo", refSHA256) }},
	} {
		if got := testing.AllocsPerRun(100, tt.f); got > tt.most {
			t.Errorf("%s: %v allocations, want at most %v", tt.what, got, tt.most)
		}
	}
}

func FuzzReference(f *testing.F) {
	for _, tt := range goodReferences {
		f.Add(tt.in)
	}
	for _, s := range []string{
		"", refSHA256, "h.io/../a", "host:99999/x", "[::1%lo]:5000/x", "[::ffff:1.2.3.4]/x", "0x7f.1/x",
		"h.io/a%2fb", "\u212aite", "a:b:c@d@e", "h.io/a-__b", strings.Repeat("a/", 600),
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ocilocal.ParseReference(s)
		if err != nil {
			if !errors.Is(err, ocilocal.ErrInvalidReference) {
				t.Fatalf("%q: %v is no ErrInvalidReference", s, err)
			}
			if !r.IsZero() {
				t.Fatalf("%q: %q beside an error", s, r)
			}
			checkReferenceMessage(t, err)
			return
		}
		again, err := ocilocal.ParseReference(r.String())
		if err != nil || again != r || again.String() != r.String() {
			t.Fatalf("%q: %q parses as %q, %v", s, r, again, err)
		}
		if r.Tag() == "" && r.Digest() == "" || r.Registry() == "" || r.Repository() == "" || len(r.Name()) > 255 {
			t.Fatalf("%q: incomplete or too long: %#v", s, r)
		}
		if r.Name() != r.Registry()+"/"+r.Repository() {
			t.Fatalf("%q: name %q, registry %q, repository %q", s, r.Name(), r.Registry(), r.Repository())
		}
		if strings.Contains(r.String(), "..") && !strings.Contains(r.Tag(), "..") {
			t.Fatalf("%q: %q has a '..'", s, r)
		}
		fromKey, err := ocilocal.ReferenceFromKey(ocilocal.ReferenceKey(r))
		if err != nil || fromKey.Name() != r.Name() || fromKey.Tag() != r.Tag() {
			t.Fatalf("%q: %q from its key is %q, %v", s, r, fromKey, err)
		}
	})
}

func BenchmarkReference(b *testing.B) {
	for _, s := range []string{
		"alpine",
		"ghcr.io/jij-inc/ommx/demo:v1",
		"ghcr.io/jij-inc/ommx/demo@" + refSHA256,
		"GHCR.io/jij-inc/ommx/demo:v1",
		"[::1]:5000/demo:v1",
	} {
		b.Run("parse/"+strings.ReplaceAll(s, "/", "|"), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := ocilocal.ParseReference(s); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("fromKey", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := ocilocal.ReferenceFromKey("ghcr.io/jij-inc/ommx/demo", "v1"); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func ExampleParseReference() {
	for _, s := range []string{"alpine", "localhost:5000/demo:v1", "ghcr.io/Org/demo"} {
		ref, err := ocilocal.ParseReference(s)
		if err != nil {
			fmt.Println(errors.Is(err, ocilocal.ErrInvalidReference))
			continue
		}
		fmt.Println(ref, "=", ref.Registry(), ref.Repository(), ref.Tag())
	}
	// Output:
	// docker.io/library/alpine:latest = docker.io library/alpine latest
	// localhost:5000/demo:v1 = localhost:5000 demo v1
	// true
}

func ExampleGitHubReference() {
	ref, err := ocilocal.GitHubReference("Jij-Inc", "ommx", "Demo", "v1")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(ref)
	// Output: ghcr.io/jij-inc/ommx/demo:v1
}

// FuzzReferencePair compares two references in all text forms. They are equal if and only if their
// texts, JSON and keys are equal. Their order is that of the keys.
func FuzzReferencePair(f *testing.F) {
	hex := strings.Repeat("0123456789abcdef", 4)
	f.Add("h.io/a:v1", "h.io/a:v2", "v1")
	f.Add("h.io/a:sha256__"+hex, "h.io/a@sha256:"+hex, "sha256__"+hex)
	f.Add("h.io/a:sha256-"+hex, "h.io/a:v1@sha256:"+hex, "sha256:"+hex)
	f.Add("alpine", "index.docker.io/library/alpine:latest", "latest")
	f.Add("[::1]:5000/a__b:T", "[0:0::1]:5000/a__b:t", "T")
	f.Add("localhost/a", "LOCALHOST/a:latest", "")
	f.Fuzz(func(t *testing.T, text1, text2, part string) {
		// A key that came from an index is taken only as it would have been written.
		if ref, err := ocilocal.ReferenceFromKey(text1, part); err == nil {
			if name, reference := ocilocal.ReferenceKey(ref); name != text1 || reference != part {
				t.Fatalf("key %q, %q is read as %s, whose key is %q, %q", text1, part, ref, name, reference)
			}
		}
		a, err := ocilocal.ParseReference(text1)
		if err != nil {
			return
		}
		for _, with := range []func(string) (ocilocal.Reference, error){
			a.WithTag, func(s string) (ocilocal.Reference, error) { return a.WithDigest(digest.Digest(s)) },
		} {
			r, err := with(part)
			if err == nil && (r.Name() != a.Name() || r.Tag() != part && string(r.Digest()) != part || (r.Tag() == "") == (r.Digest() == "")) {
				t.Fatalf("%s with %q is %s", a, part, r)
			}
			checkTexts(t, r)
		}
		checkTexts(t, a)
		b, err := ocilocal.ParseReference(text2)
		if err != nil {
			return
		}
		checkTexts(t, b)
		aName, aRef := ocilocal.ReferenceKey(a)
		bName, bRef := ocilocal.ReferenceKey(b)
		if (a == b) != (a.String() == b.String()) {
			t.Fatalf("%#v and %#v: equal is %v, their texts are %s and %s", a, b, a == b, a, b)
		}
		sameKey := aName == bName && aRef == bRef
		if sameKey != (a.Name() == b.Name() && a.Tag() == b.Tag() && (a.Tag() != "" || a.Digest() == b.Digest())) {
			t.Fatalf("%s and %s have the keys %q, %q and %q, %q", a, b, aName, aRef, bName, bRef)
		}
		order := cmp.Or(strings.Compare(aName, bName), strings.Compare(aRef, bRef))
		if c := a.Compare(b); c != -b.Compare(a) || (c == 0) != (a == b) || order != 0 && c != order {
			t.Fatalf("%s compared with %s is %d, the reverse %d; their keys are in the order %d", a, b, c, b.Compare(a), order)
		}
	})
}

// checkTexts reads each text form of a reference back.
func checkTexts(t *testing.T, r ocilocal.Reference) {
	t.Helper()
	text, err := r.MarshalText()
	if err != nil || string(text) != r.String() {
		t.Fatalf("%#v is marshalled as %q, %v, and printed as %q", r, text, err, r)
	}
	doc, err := json.Marshal(map[ocilocal.Reference]ocilocal.Reference{r: r})
	if err != nil {
		t.Fatal(err)
	}
	var back map[ocilocal.Reference]ocilocal.Reference
	if err := json.Unmarshal(doc, &back); err != nil || len(back) != 1 || back[r] != r {
		t.Fatalf("%s: JSON %s is read as %v, %v", r, doc, back, err)
	}
}
