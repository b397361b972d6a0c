package benchmarks

import "syscall"

// SyncAll waits until the disk has what earlier measures left unwritten.
func SyncAll() { syscall.Sync() }
