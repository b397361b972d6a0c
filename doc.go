// Package ocilocal keeps OCI artifacts in a local directory that any number of
// goroutines and processes share, without a daemon. Programs build artifacts
// into it, import, export, pull and push them, list and read what is there, and
// collect garbage; an artifact is either there whole or not there at all, whatever crashes.
//
// # Words and types
//
// A [Reference] such as ghcr.io/org/model:v1 is what a user calls an artifact
// by. A [Ref] is the row that points a reference at a manifest's digest; it can
// be moved. The digest is the artifact's identity; it can't. A [LocalRegistry] is an
// open root directory. A [Builder] makes one artifact. A [LocalArtifact] is an
// immutable view of one, and [Manifest] one view of the manifest forms: OCI
// image manifests, image indexes, and OCI artifact manifests. A [Remote] is a
// client of remote registries.
//
//	Builder   Import…   Pull         Load, Refs, Resolve   Export…   Push
//	     \       |      /                  |         \        |      /
//	   stage (tmp/ → blobs/)           index          verified reads
//	         \                           |                 /
//	          publish: one transaction   |                /
//	               \                     |               /
//	            index.sqlite3 ──────── names ───────── blobs/
//
// # On disk
//
//	root/index.sqlite3         SQLite in WAL mode; application_id 0x6f63696c, user_version 1
//	root/id                    the root's id, which the index holds too
//	root/blobs/<alg>/<hex>     complete, verified, read-only files
//	root/tmp/<session>/        what an open handle is writing; locked as long as it lives
//
// Digests are sha256 (what builders make), sha384 and sha512, in lower case;
// everything else is refused before it becomes a path. No path in the index is
// absolute: a root that nobody has open can be moved or copied. A directory
// whose index is another program's, another root's, or a newer version's is
// refused and left untouched. No program may open index.sqlite3 other than by
// SQLite: closing any other descriptor of it drops SQLite's locks in that process.
//
// The root is made with mode 0700, the index with 0600, blobs with 0444. An
// existing directory keeps its mode; one that everybody may write to is
// reported to [Options.Logger].
//
// # Promises
//
//   - A call that returned nil survives a power cut: blobs and their directory
//     are synced before the index's transaction commits, and that is synced too.
//   - A call that failed, was cancelled or killed has changed no ref, or has
//     made its whole change.
//   - A ref that resolves has its manifest, config and layers in place.
//   - Bytes that aren't what their digest says are never returned as good: a
//     verified reader withholds the last byte, not only the end of the file.
//   - Manifest bytes that come in go out unchanged. Builders write canonical
//     bytes: equal input, equal digest.
//   - Imports write nothing outside the root and never change their source.
//   - What a killed process leaves in tmp/ is swept by the next process that writes.
//   - [LocalRegistry.GC] deletes nothing that a ref needs, whatever else is going on, and what
//     nothing needs is gone after it: replaced and removed artifacts, and what killed
//     or failed publishes left in blobs/.
//   - Memory doesn't grow with the size of a blob or, but for collection and verification,
//     which need some 400 and 100 bytes for each blob, with the number of refs.
//
// # Remote registries
//
// [LocalRegistry.Pull] and [LocalRegistry.Push] speak the OCI distribution-spec 1.1 by net/http, and
// [LocalRegistry.Load] pulls what isn't here if [Options.Remote] is set. Blobs stream into and out of
// the store several at a time; what is there already is not sent again; a body that breaks
// off is continued, within the call and, for a pull, by the next one, also after a kill. What comes in
// counts once its digest is right, and is published by the same transaction as everything else.
//
// Registries are not trusted. Everything they send is bounded and checked before it is used. A credential
// goes to the registry it is for and to the token server that this one may name, and
// to nobody else; it is in no error, log or URL. A blob's redirect to another host is followed
// without it. A public registry can't name a token server at a loopback, link-local or private
// address. [*RemoteError] has the facts of a failure, and a sentinel tells its kind.
//
// # Upkeep
//
// [LocalRegistry.GC] deletes what no ref leads to, [LocalRegistry.GCReport] tells what it would delete.
// [LocalRegistry.Verify] compares index, files and digests; [LocalRegistry.Repair] and, where the index is lost,
// [Rebuild] put right what can be put right. [LocalRegistry.Backup] copies a live registry as it is at one moment.
// [LocalRegistry.Stats], [LocalRegistry.RefUsage] and [LocalRegistry.RepositoryUsage] count from the index.
//
// # Sharing
//
// Every method may be called from any number of goroutines, and a root may be
// open many times, in one process or in many on the same machine. Of two writers of
// one ref, under [KeepExisting] one wins and the other gets a [*ConflictError],
// under [Replace] the last to commit wins. A write waits for other processes up to
// [Options.BusyTimeout]. Contexts are looked at between steps, so a call returns soon
// after its context ends; an fsync or commit under way is finished first.
//
// # Caveats
//
//   - Network file systems are not safe for SQLite's WAL. On Linux they are
//     recognised and refused, unless [Options.AllowNetworkFS] is set.
//   - [OpenReadOnly] on a directory that this process may not write assumes that nobody
//     else writes to it while it is open.
//   - On Windows directories can't be synced; names rely on NTFS's journal there.
//
// # Limits
//
// A manifest or index may have [MaxManifestSize] bytes, those of an import or pull together
// [MaxImportManifests], an artifact [MaxClosure] blobs,
// image indexes may nest [MaxIndexNesting] deep, JSON [MaxJSONDepth], and an archive may have
// [MaxArchiveEntries] entries. Blobs have no limit. An import takes some 2 KB of memory for each of its blobs.
package ocilocal
