package ocilocal_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/ocilocal/ocilocal"
)

// TestErrorForms: an error has the registry's reason, in each form in which registries state it.
func TestErrorForms(t *testing.T) {
	long := strings.Repeat("x", 500)
	for body, want := range map[string]string{
		`{"errors":[{"code":"ODD","message":"no"}]}`:                                 "(ODD: no)",
		`{"errors":[{"code":"ODD","message":"no","detail":{"a":[1]}}]}`:              "(ODD: no)",
		`{"errors":[{"code":404,"message":"no such thing"}]}`:                        "(404: no such thing)",
		`{"errors":[{"status":400,"message":"is not\u001b[31m allowed"}]}`:           "(400: is not?[31m allowed)",
		`{"errors":["plain words"]}`:                                                 "(plain words)",
		`{"errors":{"code":"A","detail":"one only"}}`:                                "(A: one only)",
		`{"errors":[{"code":"A"},{"message":"b"}]}`:                                  "(A) (b)",
		`{"details":"incorrect username or password"}`:                               "(incorrect username or password)",
		`{"detail":"rate exceeded"}`:                                                 "(rate exceeded)",
		`{"message":"Forbidden"}`:                                                    "(Forbidden)",
		`{"error":"invalid_scope","error_description":"unknown scope"}`:              "(invalid_scope: unknown scope)",
		`{"error":{"code":7,"message":"quota"}}`:                                     "(7: quota)",
		`{"Errors":[{"Code":"A","Message":"b"}]}`:                                    "(A: b)",
		"repository is being moved\n":                                                "(repository is being moved)",
		"<html><head><style>b{}</style><title>502</title></head>Bad <b>Gateway</b>!": "(502 Bad Gateway !)",
		"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>":            "(AccessDenied)",
		"":                              "",
		"{}":                            "",
		"[1]":                           "",
		`{"errors":[]}`:                 "",
		`{"errors":null}`:               "",
		`{"message":"` + long + `"}`:    "…)",
		long:                            "…)",
		"<script>" + long + "</script>": "",
	} {
		s := newServer(t)
		s.overrideBy(func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(422)
			fmt.Fprint(w, body)
			return true
		})
		_, err := new(ocilocal.Remote).Manifest(t.Context(), s.ref("org/model:v1"))
		mustFail(t, err, ocilocal.ErrRejected)
		if text := err.Error(); !strings.HasSuffix(text, want) || want == "" && !strings.HasSuffix(text, ocilocal.ErrRejected.Error()) || len(text) > 500 {
			t.Errorf("%q: %s", body, text)
		}
	}
}

// TestNotFoundIsTheRegistrysWord: only a 404 of the registry itself is ErrNotFound.
func TestNotFoundIsTheRegistrysWord(t *testing.T) {
	in := newInternet(t)
	s := in.registry("https://registry.test", "203.0.113.1")
	s.put(t, "org/model", "v1", noise(1, 100))
	in.site("https://elsewhere.test", "203.0.113.2", http.NotFoundHandler())
	remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
	s.wantToken("https://elsewhere.test/token")
	_, err := remote.Manifest(t.Context(), s.ref("org/model:v1"))
	mustFail(t, err, ocilocal.ErrTransport)
	if e, ok := errors.AsType[*ocilocal.RemoteError](err); !ok || !e.TokenServer || errors.Is(err, ocilocal.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of the token server: %v", err)
	}
	s.sendOn("https://elsewhere.test/blob")
	_, err = openRemote(t, remote).Pull(t.Context(), s.ref("org/model:v1"), nil)
	mustFail(t, err, ocilocal.ErrTransport)
	if errors.Is(err, ocilocal.ErrNotFound) {
		t.Errorf("of another host: %v", err)
	}
	_, err = remote.Manifest(t.Context(), s.ref("org/model:other"))
	mustFail(t, err, ocilocal.ErrNotFound)
}

// TestWrongScheme: if a registry is asked with TLS and has none, or the other way round, the error
// says so.
func TestWrongScheme(t *testing.T) {
	plain := newServer(t)
	tls := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(tls.Close)
	tls.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	for name, c := range map[string]struct {
		host string
		http bool
	}{
		"plain registry by TLS":     {plain.host, false},
		"TLS registry without TLS":  {strings.TrimPrefix(tls.URL, "https://"), true},
		"a server that is not HTTP": {alertServer(t), true},
	} {
		remote := &ocilocal.Remote{PlainHTTP: func(string) bool { return c.http }, Retry: noRetry}
		t.Cleanup(remote.CloseIdleConnections)
		_, err := remote.Manifest(t.Context(), ocilocal.MustParseReference(c.host+"/org/model:v1"))
		if err == nil || !strings.Contains(err.Error(), "Remote.PlainHTTP") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// alertServer answers all requests like TLS servers that get a plain request.
func alertServer(t *testing.T) (host string) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		conn.Write([]byte("\x15\x03\x01\x00\x02\x02\x46"))
		conn.Close()
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// TestRetriesAreLogged: each repetition is logged with its cause and without secrets.
func TestRetriesAreLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		remote := newScript(answer(503, `{"message":"hush"}`), answer(429, ""), answer(200, scriptManifest)).remote()
		remote.Logger = slog.New(slog.NewTextHandler(&log, nil))
		remote.Credentials = ocilocal.StaticCredential("registry.test", ocilocal.Credential{Username: "me", Password: "hush"})
		if _, err := remote.Manifest(t.Context(), scriptRef); err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(log.String()), "\n")
		if len(lines) != 2 || !strings.Contains(lines[0], "level=WARN") || !strings.Contains(lines[0], "503") || !strings.Contains(lines[1], "attempt=2") {
			t.Errorf("log: %s", log.String())
		}
	})
}
