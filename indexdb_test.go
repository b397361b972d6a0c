package ocilocal_test

import (
	"errors"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestIndexPragmas: every connection has the settings on which durability and safety of the index
// rest. Only a power cut would show that the first one is missing.
func TestIndexPragmas(t *testing.T) {
	r := openTemp(t, nil)
	for name, want := range map[string]string{
		"synchronous": "2", "journal_mode": "wal", "foreign_keys": "1", "trusted_schema": "0", "cell_size_check": "1",
	} {
		writer, reader, err := ocilocal.IndexPragma(r, name)
		if err != nil || writer != want || reader != want {
			t.Errorf("%s is %q for the writer and %q for readers, %v; want %q", name, writer, reader, err, want)
		}
	}
	if writer, reader, err := ocilocal.IndexPragma(r, "query_only"); err != nil || writer != "0" || reader != "1" {
		t.Errorf("query_only is %q for the writer and %q for readers, %v", writer, reader, err)
	}
}

// TestIndexHardened: no statement can alter the table of the schema, and no row can be longer than
// this package's longest.
func TestIndexHardened(t *testing.T) {
	r := openTemp(t, nil)
	for _, text := range []string{"UPDATE sqlite_schema SET sql = ''", "INSERT INTO meta (key, value) VALUES ('long', hex(zeroblob(9000000)))"} {
		err := ocilocal.IndexWrite(t.Context(), r, func(exec func(string) error) error {
			if err := exec("PRAGMA writable_schema = ON"); err != nil {
				return err
			}
			return exec(text)
		})
		if !errors.Is(err, ocilocal.ErrCorruptIndex) {
			t.Errorf("%s: %v, want ErrCorruptIndex", text, err)
		}
	}
}
