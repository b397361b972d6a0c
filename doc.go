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
//	root/index.sqlite3-wal     SQLite's log, a part of the index, and -shm, while the root is open or after a crash
//	root/index.sqlite3.broken  a damaged index that Rebuild moved away; also .broken2, …
//	root/id                    the root's id, which the index holds too
//	root/blobs/<alg>/<hex>     complete, verified, read-only files
//	root/tmp/<session>/        what an open handle is writing; locked as long as it lives
//	root/tmp/partial/          what interrupted pulls have received, for the next one to resume
//	root/tmp/quarantine/       damaged files that Repair could not heal
//
// [Open] makes these in the directory that it is given, whatever else is in it. Give it one of its
// own: a blobs/ that is there, as in an image layout, is taken for the registry's. Exports write
// beside their target, or in it, under names that begin with .ocilocal- until they are complete.
//
// A newer version of this package opens what an older one has made: [Open] migrates the index.
// An older version refuses a newer index with [ErrNewerSchema]. A released schema never changes.
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
// # Manifest forms
//
// An OCI artifact manifest ([FormatArtifactManifest], image-spec 1.1.0-rc2, artifact.md) has
// blobs and no config: it says no more than an artifact needs, and is what builders make by
// default. The released image-spec 1.1 has dropped it, and most registries refuse it. An image
// manifest with an artifactType ([FormatImageManifest], image-spec 1.1, manifest.md, "Guidelines for
// Artifact Usage") is what they take: choose it for what is to be pushed, in
// [BuilderOptions] or for all builders in [Options]. [LocalRegistry.Convert] makes either of the
// other. Both are read, imported, exported and pulled alike, and [Manifest] shows both in one way.
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
// # Errors
//
// Methods of a registry, and of builders, artifacts and remotes, return an [*Error], which says what was done
// to what; [errors.Is] finds its cause: a sentinel such as [ErrNotFound], an error of the file system, that of
// the context, or that of a reader, writer or function that the caller gave. [*ConflictError], [*RemoteError], [*SchemaError] and
// [*MissingSubjectError] have more facts. Text is for people, and may change.
//
// Doc comments name the errors that are a method's own. Besides, any method that takes a context may return
// the context's, and, after Close, [ErrClosed]; one that reads the index [ErrCorruptIndex] and [ErrIndexIO]; one that
// reads or writes files the file system's; and one that writes [ErrReadOnly], [ErrNoSpace] and [ErrBusy].
//
// # Remote registries
//
// [LocalRegistry.Pull] and [LocalRegistry.Push] speak the OCI distribution-spec 1.1 by net/http, and
// [LocalRegistry.Load] pulls what isn't here if [Options.Remote] is set. Blobs stream into and out of
// the store several at a time; what is there already is not sent again; a body that breaks
// off is resumed, within the call and, for a pull, by the next one, also after a kill. What comes in
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
//   - SQLite believes the files beside a database. So before each connection to any database there
//     must be no journal, and -wal and -shm must be regular files that belong to the database's
//     owner, to this user or to root. Otherwise the call fails with [ErrForeignIndex]. The log of
//     another registry is noticed; an old log of the same registry is not. Whoever may write to
//     a root decides what is in it.
//   - On Windows directories can't be synced; names rely on NTFS's journal there.
//
// # Limits
//
// A manifest or index may have [MaxManifestSize] bytes, those of an import or pull together
// [MaxImportManifests], an artifact [MaxClosure] blobs,
// image indexes may nest [MaxIndexNesting] deep, JSON [MaxJSONDepth], and an archive may have
// [MaxArchiveEntries] entries. Blobs have no limit. An import takes some 2 KB of memory for each of its blobs.
package ocilocal
