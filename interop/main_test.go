package interop_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// toolTimeout is how long one run of a tool may take before it is stuck.
const toolTimeout = 2 * time.Minute

// programs are where each tool's program is, below the cache of the script
// setup unless it is one that the system has.
var programs = map[string]string{
	"skopeo":          "skopeo",
	"umoci":           "umoci",
	"podman":          "podman",
	"buildah":         "buildah",
	"docker-registry": "docker-registry",
	"oras":            "bin/oras",
	"crane":           "bin/crane",
	"regctl":          "bin/regctl",
	"registry3":       "bin/registry3",
	"conformance":     "bin/conformance",
	"containerd":      "bin/containerd",
	"ctr":             "bin/ctr",
	"dockerd":         "bin/dockerd",
	"ommx2":           "ommx2/bin/python",
	"ommx3":           "ommx3/bin/python",
	"ommx3a":          "ommx3a/bin/python",
}

// skipped counts the tests that each missing tool cost.
var skipped = struct {
	sync.Mutex
	tests map[string]int
}{tests: map[string]int{}}

func TestMain(m *testing.M) {
	if root := os.Getenv(workerEnv); root != "" {
		work(root)
		return
	}
	code := m.Run()
	for _, name := range slices.Sorted(maps.Keys(skipped.tests)) {
		fmt.Printf("SKIPPED: %s is missing (interop/setup gets it): %d tests\n", name, skipped.tests[name])
	}
	os.Exit(code)
}

// cacheDir is where the script setup puts programs.
func cacheDir() string {
	if dir := os.Getenv("OCILOCAL_INTEROP"); dir != "" {
		return dir
	}
	if dir := os.Getenv("XDG_CACHE_HOME"); dir != "" {
		return filepath.Join(dir, "ocilocal-interop")
	}
	return filepath.Join(os.Getenv("HOME"), ".cache", "ocilocal-interop")
}

// findTool returns a tool's program.
func findTool(name string) (string, error) {
	program, ok := programs[name]
	if !ok {
		return "", fmt.Errorf("%q is not among the tools", name)
	}
	if filepath.Base(program) != program {
		program = filepath.Join(cacheDir(), program)
	}
	return exec.LookPath(program)
}

// required tells whether a tool's absence is a failure.
func required(name string) bool {
	list := os.Getenv("OCILOCAL_INTEROP_REQUIRE")
	return list == "1" || slices.Contains(strings.Fields(list), name)
}

// need returns a tool's program, and skips the test without it.
func need(t *testing.T, name string) string {
	t.Helper()
	path, err := findTool(name)
	if err == nil {
		return path
	}
	if required(name) {
		t.Fatalf("%s is required and missing: %v", name, err)
	}
	skipped.Lock()
	skipped.tests[name]++
	skipped.Unlock()
	t.Skipf("SKIPPED: %s is missing (interop/setup gets it): %v", name, err)
	return ""
}

// A box is what tools see of the world: a directory to work in and a home of
// its own, so that nothing on the machine, such as its credentials, has a say.
type box struct {
	t          *testing.T
	dir        string
	env        []string
	configFile string // credentials, in Docker's form
}

func newBox(t *testing.T) *box {
	t.Helper()
	home := t.TempDir()
	b := &box{t: t, dir: t.TempDir(), configFile: filepath.Join(home, "config.json")}
	b.env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + home, "TMPDIR=" + t.TempDir(),
		"DOCKER_CONFIG=" + home, "REGISTRY_AUTH_FILE=" + b.configFile,
	}
	b.write(b.configFile, "{}") // skopeo wants it to exist
	return b
}

// setenv gives the tools a variable, in the place of an earlier one.
func (b *box) setenv(key, value string) {
	b.env = append(b.env, key+"="+value)
}

// path is where the tools find a file of this name.
func (b *box) path(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(b.dir, name)
}

func (b *box) write(name, content string) {
	b.t.Helper()
	if err := os.WriteFile(b.path(name), []byte(content), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// try runs a tool and returns what it printed.
func (b *box) try(tool string, args ...string) (stdout, stderr string, err error) {
	b.t.Helper()
	program := need(b.t, tool)
	ctx, cancel := context.WithTimeout(b.t.Context(), toolTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir, cmd.Env = b.dir, b.env
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return strings.TrimSpace(out.String()), strings.TrimSpace(errs.String()), err
}

// run runs a tool that must succeed, and returns its trimmed standard output.
func (b *box) run(tool string, args ...string) string {
	b.t.Helper()
	stdout, stderr, err := b.try(tool, args...)
	if err != nil {
		b.t.Fatalf("%s %s: %v\n%s\n%s", tool, strings.Join(args, " "), err, stdout, stderr)
	}
	return stdout
}
