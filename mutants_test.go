package ocilocal_test

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A mutant is a mistake that was seeded in the code once: old becomes new, in the one place that has
// old. At least one of the tests must then fail. The gate builds the mutants with a mark, the full
// form builds all.
type mutant struct {
	name, old, new string
	tests          string // a pattern for -test.run
	gate           bool
}

var mutants = []mutant{
	{"no fsync of files", "return f.file.Sync()", "return nil",
		"TestRealSyncs", true},
	{"no fsync of directories", "err = d.Sync()\n\treturn errors.Join(err, d.Close())\n}\n", "return errors.Join(err, d.Close())\n}\n",
		"TestRealSyncs", true},
	{"no fsync asked for", "err := sf.file.sync()\n", "var err error\n",
		"TestDurableOrder", false},
	{"commits without fsync", `"synchronous(FULL)"`, `"synchronous(NORMAL)"`,
		"TestIndexPragmas", true},
	{"reused blobs not synced", "return st.fail(errors.Join(f.sync(), f.Close()))", "return f.Close()",
		"TestDurableOrder|TestFailedDirectorySync", true},
	{"a deferred transaction", `t.exec("BEGIN IMMEDIATE")`, `t.exec("BEGIN")`,
		"TestManyWriters|TestFirstWritesAtOnce|TestScheduleCloseDuringPublish|TestScheduleHolderKilled", false},
	{"no check of blobs in the transaction", "if err := st.recheck(d, size); err != nil {", "if err := error(nil); err != nil {",
		"TestPartMissing|TestScheduleReuseBetweenUnlinks|TestPutBackDurably", true},
	{"garbage is deleted though a ref has it again", "if used, err := hasRef(tx, n.digest); used || err != nil {", "if used, err := hasRef(tx, n.digest); used && err != nil {",
		"TestSchedulePublishMarked|TestScheduleCollectAndReplace", true},
	{"no digest check on read", "if got == d {\n\t\treturn nil", "if true {\n\t\treturn nil",
		"TestVerifiedReader|TestCorruption", true},
	{"tiny blobs are not verified", "err = checkContent(d, digestOf(d.Algorithm(), b))", "_ = checkContent(d, digestOf(d.Algorithm(), b))",
		"TestServeTiny|TestServeDamaged", false},
	{"bytes after the end are not noticed", "case n > 0:\n\t\treturn fmt.Errorf(\"blob %s: %w: goes on", "case n > 1:\n\t\treturn fmt.Errorf(\"blob %s: %w: goes on",
		"TestVerifiedReader|TestCorruption", false},
	{"credentials follow redirects", "crossed = crossed || !sameOrigin(u, p.host.base)", "crossed = crossed || false",
		"TestHostileRedirects", true},
	{"deletions follow redirects", "if c.method == http.MethodDelete {\n\t\treturn protocolError", "if false {\n\t\treturn protocolError",
		"TestUploadsElsewhere|TestPrivateTargets|TestRemoteDelete", false},
	{"an absent ref is as expected", "case o.Expected != \"\" && existing != o.Expected:", "case o.Expected != \"\" && existing != \"\" && existing != o.Expected:",
		"TestExpectedAbsent", true},
	{"a tag that has moved is removed", "if !ok || ref.Digest() != \"\" && ref.Digest() != desc.Digest {\n\t\t\treturn ErrNotFound", "if !ok {\n\t\t\treturn ErrNotFound",
		"TestRemoveTagAndDigest", false},
	{"an answer with a bad range keeps its slot", "res.Body.Close()\n\t\treturn nil, 0, answerProblem(c, res, err)", "return nil, 0, answerProblem(c, res, err)",
		"TestBadRangesKeepNoSlots", false},
	{"the request that is to lead withdraws", "if i < 0 || len(req.lead) > 0 {", "if i < 0 {",
		"TestWithdrawnLeader", false},
	{"a backup does not look again before it merges", "merge(ctx context.Context, tx *indexTx) error {\n\tif err := b.checkMark(tx); err != nil {", "merge(ctx context.Context, tx *indexTx) error {\n\tif err := error(nil); err != nil {",
		"TestBackupTargetChanges", false},
	{"a step does not see that the index became unreconciled", "if v, err := meta(tx, metaUnreconciled); err != nil || v != \"\" {", "if v, err := meta(tx, metaUnreconciled); err != nil && v != \"\" {",
		"TestGCUnreconciledMeanwhile", false},
	{"a file that was written again is deleted", "case s.gone[n.digest] || s.opts.young(fi.ModTime(), s.began):", "case s.gone[n.digest] && s.opts.young(fi.ModTime(), s.began):",
		"TestScheduleWrittenAgainWithoutLinks", false},
	{"a step does not displace a hidden commit", "if !prepared {", "if prepared {",
		"TestCollectionAfterUnseenCommit|TestUnseenCommitOnFullDisk", false},
	{"a collection keeps no subjects", "h <= holdSubject && s >= 0 && !g.nodes[s].absent {", "h < holdNone && s >= 0 && !g.nodes[s].absent {",
		"TestGCLineage", false},
	{"a link replaces another publisher's", "err = r.Link(name, to)\n\tif !linkUnsupported(err) {\n\t\treturn false, err\n\t}\n", "err = r.Rename(name, to)\n\tif !linkUnsupported(err) {\n\t\treturn err == nil, err\n\t}\n",
		"TestDurable|TestLinkedAgainByAnother|TestFirstOpenRace|TestExportersRace|TestExportArchiveFile", false},
}

// mutated returns the source file that has the place of m, and its text with the mistake.
func (m *mutant) mutated(t *testing.T) (file, text string) {
	t.Helper()
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	places := 0
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		src, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(src), m.old); n > 0 {
			places += n
			file, text = name, strings.Replace(string(src), m.old, m.new, 1)
		}
	}
	if places != 1 {
		t.Fatalf("the package has %q %d times: seed this mistake where the code is now", m.old, places)
	}
	return file, text
}

// TestMutants builds the tests with each mistake and expects that they find it. The quick run only
// checks that the mistakes can still be made where the table says.
func TestMutants(t *testing.T) {
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("there is no go command to build with")
	}
	for i := range mutants {
		m := &mutants[i]
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			name, src := m.mutated(t)
			if deepLevel() == 0 || deepLevel() == 1 && !m.gate {
				return
			}
			if _, err := exec.LookPath("strace"); err != nil && strings.Contains(m.tests, "TestRealSyncs") {
				t.Skip("strace is not installed, and only it sees this mistake")
			}
			file, err := filepath.Abs(name)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			patched, overlay, binary := filepath.Join(dir, name), filepath.Join(dir, "overlay.json"), filepath.Join(dir, "test")
			write(t, patched, src)
			replace, err := json.Marshal(map[string]map[string]string{"Replace": {file: patched}})
			if err != nil {
				t.Fatal(err)
			}
			write(t, overlay, string(replace))
			// Without inlining a build takes two thirds of the time.
			if out, err := exec.Command(goTool, "test", "-c", "-vet=off", "-gcflags=-l", "-overlay", overlay, "-o", binary, ".").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			// A mistake may also make a test hang.
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, binary, "-test.failfast", "-test.run", "^("+m.tests+")")
			cmd.Env = append(os.Environ(), deepEnv+"=0")
			out, err := cmd.CombinedOutput()
			if err == nil {
				t.Errorf("%s pass with this mistake:\n%s", m.tests, out)
			} else if ctx.Err() == nil && !strings.Contains(string(out), "--- FAIL") && !strings.Contains(string(out), "panic:") {
				t.Errorf("no test failed: %v\n%s", err, out)
			}
		})
	}
}
