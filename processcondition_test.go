package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// upkeep are the calls that judge what is there. Each returns what it would report as damage.
var upkeep = map[string]func(ctx context.Context, r *ocilocal.LocalRegistry, dir string) (damage []string, err error){
	"verify": func(ctx context.Context, r *ocilocal.LocalRegistry, _ string) (damage []string, err error) {
		for p, err := range r.Verify(ctx, nil) {
			if err != nil {
				return damage, err
			}
			damage = append(damage, p.String())
		}
		return damage, nil
	},
	"backup": func(ctx context.Context, r *ocilocal.LocalRegistry, dir string) (damage []string, err error) {
		report, err := r.Backup(ctx, dir, nil)
		if report != nil {
			for _, f := range report.Failed {
				damage = append(damage, fmt.Sprintf("%s: %v", f.Digest, f.Err))
			}
		}
		return damage, err
	},
	"repair": func(ctx context.Context, r *ocilocal.LocalRegistry, _ string) (damage []string, err error) {
		report, err := r.Repair(ctx, nil)
		if report != nil {
			for _, p := range report.Left {
				damage = append(damage, p.String())
			}
			for _, d := range report.Quarantined {
				damage = append(damage, fmt.Sprintf("%s is in quarantine", d))
			}
		}
		return damage, err
	},
	"gc": func(ctx context.Context, r *ocilocal.LocalRegistry, _ string) (damage []string, err error) {
		report, err := r.GC(ctx, nil)
		if report != nil {
			for _, d := range report.Missing {
				damage = append(damage, fmt.Sprintf("%s is missing", d))
			}
			for _, m := range report.Invalid {
				damage = append(damage, fmt.Sprintf("%s is invalid: %v", m.Digest, m.Err))
			}
			damage = append(damage, report.Foreign...)
		}
		return damage, err
	},
}

// sound makes a registry with some artifacts, which need each other.
func soundRegistry(t *testing.T, n int) *ocilocal.LocalRegistry {
	t.Helper()
	r := openTemp(t, nil)
	var subject *ocilocal.LocalArtifact
	for i := range n {
		subject = published(t, r, fmt.Sprintf("example.com/a:v%d", i), fmt.Sprint("layer ", i), subject)
	}
	return r
}

// TestProcessConditions: when the process runs out of something, or the call is cancelled, upkeep
// ends with that error, at whichever file operation it comes. Nothing is then said to be damaged or
// missing.
func TestProcessConditions(t *testing.T) {
	t.Parallel()
	conditions := []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, context.Canceled}
	for name, call := range upkeep {
		t.Run(name, func(t *testing.T) {
			r := soundRegistry(t, 3)
			dir := t.TempDir()
			for unreconciled := range 2 {
				if unreconciled == 1 { // then files without rows are looked at too
					if name == "gc" {
						continue // it refuses
					}
					execIndex(t, r.Root(), "INSERT OR REPLACE INTO meta VALUES ('unreconciled', '1')")
				}
				record := &pointSeam{}
				ocilocal.SetFault(r, record.fault)
				if _, err := call(t.Context(), r, filepath.Join(dir, fmt.Sprint("recorded", unreconciled))); err != nil {
					t.Fatal(err)
				}
				ended := 0
				for i, p := range everyNth(record.points, scaled(3, 1, 1)) {
					if unreconciled == 1 {
						execIndex(t, r.Root(), "INSERT OR REPLACE INTO meta VALUES ('unreconciled', '1')")
					}
					ctx, cancel := context.WithCancel(t.Context())
					condition := conditions[i%len(conditions)]
					once := false
					seam := &pointSeam{at: p, act: func() error {
						once = true
						if condition == context.Canceled {
							cancel()
							return nil
						}
						return condition
					}}
					ocilocal.SetFault(r, seam.fault)
					damage, err := call(ctx, r, filepath.Join(dir, fmt.Sprint(unreconciled, i)))
					cancel()
					ocilocal.SetFault(r, nil)
					if len(damage) > 0 && !(len(damage) == 1 && strings.HasPrefix(damage[0], string(ocilocal.ProblemUnreconciled))) {
						t.Errorf("%v at %v: %q, %v", condition, p, damage, err)
					}
					if err != nil && !errors.Is(err, condition) {
						t.Errorf("%v at %v: %v", condition, p, err)
					}
					if once && err != nil {
						ended++
					}
				}
				if ended == 0 {
					t.Errorf("none of %d operations ended it", len(record.points))
				}
			}
			execIndex(t, r.Root(), "DELETE FROM meta WHERE key = 'unreconciled'")
			checkSound(t, r)
		})
	}
}
