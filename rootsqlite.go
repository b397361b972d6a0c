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

// checkDatabase decides whether SQLite may open the database at path. SQLite believes what lies
// beside a database: it plays a journal back, and a write-ahead log decides what every row says. It
// blocks on a named pipe, and follows links. So this is asked before each connection to any
// database:
//
//   - path is absolute. A relative one would mean another file after a change of directory.
//   - The database and its -wal and -shm are missing, or regular files with one link. A
//     database itself may have more, as versions before this one left it while they created it.
//   - They belong to the database's owner, to this user or to root (Unix), unless anyOwner is set.
//   - There is no -journal. All databases that this package opens use a write-ahead log, so
//     a journal is another database's, or another program's. The exception is a
//     database with ownJournal, which this process alone is writing.
//
// Limit: nothing stops who may write to the directory from putting files there after the check, nor
// the database's owner from putting an old log of the same database there. A root is one trust
// domain.
//
// Errors: [ErrForeignIndex], [ErrInvalidArgument] for a relative path, and the file system's.
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
