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
//	root/index.sqlite3         SQLite in WAL mode; application_id 0x6f63696c, user_version 2
//	root/index.sqlite3-wal     SQLite's log, a part of the index; -shm beside it is its shared memory
//	root/index.sqlite3.broken  a damaged index that Rebuild moved away; also .broken2, …
//	root/id                    the root's id, which the index holds too
//	root/blobs/<alg>/<hex>     complete, verified, read-only files
//	root/tmp/<session>/        what an open handle is writing; locked as long as it lives
//	root/tmp/partial/          what interrupted pulls have received, for the next one to resume
//	root/tmp/held/             blobs that were put into a repository, until they are too old
//	root/tmp/upload/           blobs that clients of a Handler are sending
//	root/tmp/quarantine/       damaged files that Repair could not heal
//
// [Open] makes a registry only where the names id, tmp and blobs are free; otherwise it fails with
// [ErrForeignRoot] and changes nothing. The id comes first and marks the rest as the registry's.
// Files under other names may lie in the directory, and are never touched. In tmp/, only entries
// with the marks of this package are deleted: its naming scheme, the expected type and mode.
// Exports write beside their target, or in it, under names that begin with .ocilocal- until they
// are complete. No call writes a file of the caller into the registry itself: exports and backups
// to a path that leads there, also by links or mounts, fail with [ErrInvalidArgument].
//
// A newer version of this package opens what an older one has made: [Open] migrates the index.
// An older version refuses a newer index with [ErrNewerSchema]. A released schema never changes.
// The index stores digests as bytes and names them by numbers. For people who look at it with the
// program sqlite3, the views readable_refs and readable_content have digests as text.
//
// Digests are sha256 (which builders make), sha384 and sha512, in lower case; everything else is
// refused before it becomes a path. No path in the index is absolute: a root that nobody has open
// can be moved or copied. A handle stays with the directory that it opened: if that is moved or
// replaced meanwhile, every call that uses the index fails with [ErrForeignIndex]. A directory
// whose index is another program's, another root's, or a newer version's is refused and left
// untouched. Open index.sqlite3 only with SQLite: closing any other descriptor of it drops the
// locks that SQLite holds in that process.
//
// # Trust
//
// One root is one trust domain. Whoever may write to its directory decides what every reference
// in it means, and can delete everything. So the root is made with mode 0700, the index with 0600,
// and blobs with 0444. An existing directory keeps its mode; one that its group or everybody may
// write to is reported to [Options.Logger]. On Unix, a root, index, log, tmp/ or blobs/ that
// belongs to neither this user nor root is refused, unless [Options.AllowOtherOwner] is set.
//
// All programs and users that share a root see the same content: a blob that one of them pulled
// with a credential, the others can read without one. Keep what must stay apart in different
// roots, and content of different registries apart with [Options.SeparateRegistries].
//
// A name in an archive or layout is a claim of whoever made it. An import sets refs by these
// names, and a later Load answers from them. [ImportOptions] can restrict, change or ignore the
// names: use that for content from a source that is not trusted with all of them. Digests need no
// trust: bytes either hash to their digest or are refused.
//
// # Manifest forms
//
// Builders make image manifests with an artifactType ([FormatImageManifest], image-spec 1.1,
// manifest.md, "Guidelines for Artifact Usage"), the form that registries and other tools read.
// The config is the empty object {} unless [Builder.SetConfig] sets one. An artifact without layers
// has that object as its layer too.
//
// An OCI artifact manifest ([FormatArtifactManifest], image-spec 1.1.0-rc2, artifact.md) has blobs
// and no config. The released image-spec 1.1 has dropped it, and most registries and tools refuse
// it. Choose it for artifacts that stay in local registries, or whose readers expect this form:
// in [BuilderOptions] for one artifact, or in [Options] for all builders of a registry.
// [LocalRegistry.Convert] writes an artifact in the other form, under another digest. Both forms
// are read, imported, exported and pulled alike, and [Manifest] shows both in one way.
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
//   - The next process that writes removes whatever a killed process has left in tmp/.
//   - Nothing is deleted, renamed or truncated that this package did not make.
//   - [LocalRegistry.GC] deletes nothing that a ref needs, whatever else is going on, and what
//     nothing needs is gone after it: replaced and removed artifacts, and what killed
//     or failed publishes left in blobs/. An artifact whose subject stays is kept, too, unless
//     [GCOptions.DropReferrers] is set.
//   - Memory does not grow with the size of a blob, nor with the number of refs, except that
//     collection needs some 400 bytes for each blob, and verification some 100.
//
// # Names in content
//
// An archive or layout says itself what its entries are called. The import of an entry depends on
// the name that it has in index.json:
//
//   - A full name, such as ghcr.io/org/app:v1, becomes a ref. containerd writes it to the annotation
//     io.containerd.image.name, other tools to org.opencontainers.image.ref.name.
//   - A tag alone, as oras, skopeo and umoci write it, is [ErrBareName]. ImportOptions.Repository
//     completes all tags, and ImportOptions.Reference names one entry.
//   - A name with the digest of other content is kept as an annotation. It names nothing.
//   - Content without a name is stored by digest, and [ImportResult.Unnamed] lists it. A collection
//     deletes it after its grace period, unless [LocalRegistry.Tag] names it before. LoadPath and
//     ImportOptions.Anonymous make up a name.
//
// A name in content is a claim: its writer chose it, and nothing proves that the name is theirs. An
// import keeps the refs that exist, but by default it sets each new one, on any host, and a later
// Load serves it. For content from somebody who is not trusted with every name, ImportOptions.Name
// restricts names, and ImportOptions.IgnoreNames sets none.
//
// Exports write full names. [ExportOptions.Names] is for tools that look for a tag.
//
// What else an entry of index.json says, its platform and its annotations, is kept in the index of
// the registry: with the ref, or with the manifest if it got no ref. Exports of that ref or digest
// write it again. It belongs to the content: a ref that moves loses it, unless the import that
// moves the ref brings its own. A Tag takes it from another ref of the same manifest, and the first
// ref of content that was imported by digest takes it from there. ImportRegistry, Backup and Rebuild
// keep it, and Convert keeps the platform. Push, Pull and the handler don't, because a registry has
// no place for it. urls and data are not kept.
//
// # Raw content
//
// [LocalRegistry.Repository] is a view of one name, by which content is put, read and deleted as
// over the distribution API. It shows what the refs of the name lead to and what it holds, and
// nothing else of the registry. A blob that was put is held for the repository, below tmp/, until
// it is too old: it is visible to every process at once, and becomes durable with the manifest that
// needs it. A manifest that was put is durable with all that it needs. One without a tag is held by
// a row of the index. Holds keep content as refs do, until [GCOptions.Held] has passed and nothing
// else keeps it.
//
// # Absent members
//
// An image index may name manifests of platforms that its archive leaves out, and an image may
// name foreign layers, which are not distributed with it (image-spec layer.md, "Non-Distributable
// Layers"). An import takes both and lists what is missing in [ImportResult.Absent]. The rows
// record it as absent, so that it counts neither as lost nor as needed. Absence is recorded of
// content, once for the whole registry. Exports, backups, copies and pushes leave it out; whether
// a registry takes such an artifact is its decision. Reading it fails with [ErrAbsent]. A later
// import, or a pull of the same manifest, fills it in. A pull leaves out foreign layers that the
// registry does not have, and wants every member of an index. The urls of foreign layers are never
// fetched. A mirror records whatever its clients have not asked for yet as absent: see [Upstream].
//
// # Errors
//
// Methods of a registry, and of builders, artifacts and remotes, return an [*Error], which says
// what was being done to what. [errors.Is] finds its cause: a sentinel such as [ErrNotFound], an
// error of the file system or of the context, or that of a reader, writer or function that the
// caller gave. [*ConflictError], [*RemoteError], [*SchemaError] and [*MissingSubjectError] have
// more facts. Text is for people, and may change.
//
// Doc comments name the errors that are particular to a method. In addition:
//   - Any method that takes a context may return the context's error and, after Close, [ErrClosed].
//   - One that reads the index may return [ErrCorruptIndex], [ErrIndexIO] and [ErrForeignIndex].
//   - One that reads or writes files may return any error of the file system.
//   - One that writes may return [ErrReadOnly], [ErrNoSpace] and [ErrBusy].
//
// # Remote registries
//
// [LocalRegistry.Pull] and [LocalRegistry.Push] speak the OCI distribution-spec 1.1 over net/http,
// and [LocalRegistry.Load] pulls a missing artifact if [Options.Remote] is set. Blobs stream into
// and out of the store, several at a time. A blob that is already there is not sent again. A body
// that breaks off is resumed, within the call and, for a pull, by the next one, also after a kill.
// Content counts once its digest is right, and is published by the same transaction as all else.
//
// Registries are not trusted. Whatever they send is bounded and checked before it is used. A
// credential goes to the registry it is for and to the token server that this registry may name,
// and nowhere else; it is in no error, log or URL. A blob's redirect to another host is followed
// without it. A public registry cannot send requests to a loopback, link-local or private
// address. [*RemoteError] has the facts of a failure, and a sentinel says of which kind it is.
//
// # Serving
//
// [LocalRegistry.Handler] serves a registry by the OCI distribution-spec 1.1 to any client: all of
// pull, push, discovery and deletion, without a daemon. Repository org/app of the server is
// localhost/org/app in the registry: see [HandlerOptions]. It passes the official conformance suite.
//
// Several processes can serve one root, while others build, import and collect in it. An upload is a
// file below tmp/, so a client can continue it in another process. Blobs are held for their
// repository as in [Repository.PutBlob].
//
// A manifest that was acknowledged is durable with all that it needs. Blobs are synced only then. A
// power cut may lose an acknowledged blob that no manifest names; a manifest that needs it is then
// refused, and the client sends the blob again.
//
// Nobody receives all bytes of a damaged blob. A large one is verified while it is sent: if it is
// damaged, the answer breaks off before its last byte. A small one, and one of which a range is asked
// for, is verified before. A handle does not verify a file again that has not changed.
//
// With an [Upstream] the handler is a mirror. It fetches each manifest and blob when a client first
// asks for it, once for all clients, and sends a large blob while it arrives. It serves what it has
// while the other registry is down. Docker uses it by registry-mirrors, containerd by hosts.toml, and
// podman, buildah and skopeo by registries.conf. containerd names the registry in the query: a
// [HandlerOptions.Name] that reads ns lets one handler mirror several registries.
//
// The zero HandlerOptions are for tests and for programs of one user. Before other machines can
// reach the handler, set:
//   - [HandlerOptions.Authorize] or [HandlerOptions.ReadOnly]. Without them everybody may push and
//     delete, and whoever knows the digest of a blob may mount it from any repository.
//   - [HandlerOptions.MaxBlobSize] and [HandlerOptions.MaxUploads]. A quota of the file system bounds
//     what pushes can store in all.
//   - ReadHeaderTimeout, IdleTimeout and MaxHeaderBytes of the [net/http.Server], and TLS. The handler
//     ends requests that make no progress: see [HandlerOptions.StallTimeout].
//
// # Upkeep
//
// [LocalRegistry.GC] deletes the content to which no ref leads; [LocalRegistry.GCReport] lists it.
// [LocalRegistry.Verify] compares index, files and digests. [LocalRegistry.Repair] and, where the
// index is lost, [Rebuild] restore as much as can be restored. [LocalRegistry.Backup] copies a live
// registry as it is at one moment. [LocalRegistry.Stats], [LocalRegistry.RefUsage] and
// [LocalRegistry.RepositoryUsage] count from the index.
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
// [MaxArchiveEntries] entries. Blobs have no limit. An import takes some 2 KB of memory for each of
// its blobs.
package ocilocal
