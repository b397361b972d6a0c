package ocilocal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// databaseFiles are the suffixes of the files that SQLite opens for one database. The first is the
// database itself.
var databaseFiles = [...]string{"", "-journal", "-wal", "-shm"}

// checkDatabase decides whether SQLite may open the database at path. SQLite believes the files
// beside a database: it plays a journal back, and a write-ahead log decides what every row says. It
// blocks on a named pipe, and follows links. So each connection to any database is preceded by this
// check:
//
//   - path is absolute. A relative one would mean another file after a change of directory.
//   - The database and its -wal and -shm are missing, or regular files with one link. Only the
//     database may have more: earlier versions of this package linked it while they created it.
//   - They belong to the database's owner, to this user or to root (Unix), unless anyOwner is set.
//   - There is no -journal. All databases that this package opens use a write-ahead log, so a
//     journal belongs to another database or another program. The exception is a database with
//     ownJournal, which only this process writes.
//
// Limit: whoever may write to the directory can put files there after the check, and the owner of
// the database can put an old log of it there. A root is one trust domain.
//
// Errors: [ErrForeignIndex], [ErrInvalidArgument] for a relative path, and any error of the file
// system.
func checkDatabase(path string, ownJournal, anyOwner bool) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%w: path of database %q is not absolute", ErrInvalidArgument, path)
	}
	owners := []int{os.Geteuid(), 0}
	for i, suffix := range databaseFiles {
		fi, err := os.Lstat(path + suffix)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		name := filepath.Base(path) + suffix
		if !fi.Mode().IsRegular() {
			return fmt.Errorf("%w: %s is not a regular file (%v)", ErrForeignIndex, name, fi.Mode().Type())
		}
		if suffix == "-journal" && !ownJournal {
			return fmt.Errorf("%w: %s exists, a journal that this database does not use (let the program that wrote it finish, or move it away)",
				ErrForeignIndex, name)
		}
		owner, links := ownerAndLinks(fi)
		if i == 0 {
			owners = append(owners, owner)
			continue
		}
		if links > 1 {
			return fmt.Errorf("%w: %s is a hard link to another file", ErrForeignIndex, name)
		}
		if !anyOwner && !slices.Contains(owners, owner) {
			return fmt.Errorf("%w: %s belongs to user %d, and the database does not", ErrForeignIndex, name, owner)
		}
	}
	return nil
}
