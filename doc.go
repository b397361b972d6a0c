// Package ocilocal keeps OCI artifacts in a local directory that any number of goroutines and
// processes share, without a daemon. Programs build, import, pull, list, read, export and push
// artifacts, and collect garbage. After any crash, each artifact is there whole or not at all.
//
// # Words and types
//
// A [Reference], such as ghcr.io/org/model:v1, is the name of an artifact. A [Ref] is the row of
// the index that points a reference at the digest of a manifest. A ref can be moved. The digest is
// the identity of the artifact and cannot change. A [LocalRegistry] is an open root directory. A
// [Builder] makes one artifact. A [LocalArtifact] is an immutable view of one artifact. [Manifest]
// is one view of all forms of manifests: OCI image manifests, image indexes, and OCI artifact
// manifests. A [Remote] is a client of remote registries.
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
//	root/id                    the root's id, which is also in the index
//	root/blobs/<alg>/<hex>     complete, verified, read-only files
//	root/tmp/<session>/        files that an open handle is writing; locked while the handle is open
//	root/tmp/partial/          blobs of interrupted pulls, for the next pull to resume
//	root/tmp/held/             blobs that were put into a repository, until they are too old
//	root/tmp/upload/           blobs that clients of a Handler are sending
//	root/tmp/quarantine/       damaged files that Repair could not heal
//
// [Open] makes a registry only if the names id, tmp and blobs are free. Otherwise it fails with
// [ErrForeignRoot] and changes nothing. The id is made first. It marks the rest as part of a
// registry. Files under other names may be in the directory, and are never touched. In tmp/, only
// entries with the marks of this package are deleted: its naming scheme, the expected type and
// mode. Exports write beside their target, or in it, under names that begin with .ocilocal- until
// they are complete. Exports and backups never write into the registry itself: a path that leads
// there, also by links or mounts, is [ErrInvalidArgument].
//
// A newer version of this package opens registries of older versions: [Open] migrates the index. An
// older version refuses a newer index with [ErrNewerSchema]. A released schema never changes. The
// index stores each digest once, as bytes, and refers to it by number. For people who read the
// index with the program sqlite3, the views readable_refs and readable_content have digests as
// text.
//
// Digests are sha256 (which builders make), sha384 and sha512, in lower case. Any other digest is
// refused before it becomes a path. No path in the index is absolute, so a root can be moved or
// copied while no process has it open. A handle stays with the directory that it opened. If that is
// moved or replaced meanwhile, every call that uses the index fails with [ErrForeignIndex]. If the
// index of a directory belongs to another program, another root or a newer version, the directory
// is refused and not changed. Open index.sqlite3 only with SQLite: closing any other descriptor of
// it drops the locks that SQLite holds in that process.
//
// # Trust
//
// One root is one trust domain. Everybody who may write to its directory decides what every
// reference in it means, and can delete everything. So the root is made with mode 0700, the index
// with 0600, and blobs with 0444. An existing directory keeps its mode. If its group or everybody
// may write to it, that is reported to [Options.Logger]. On Unix, a root, index, log, tmp/ or
// blobs/ that belongs to neither this user nor root is refused, unless [Options.AllowOtherOwner] is
// set.
//
// All programs and users that share a root see the same content. If one of them pulls a blob with a
// credential, the others can read it without one. Use different roots for content that must stay
// apart. [Options.SeparateRegistries] keeps content of different registries apart.
//
// A name in an archive or layout is a claim of its writer. An import sets refs by these names, and
// a later Load answers from them. [ImportOptions] can restrict, change or ignore the names. Use
// that for content from a source that is not trusted with all names. Digests need no trust: bytes
// either hash to their digest or are refused.
//
// # Manifest forms
//
// Builders make image manifests with an artifactType ([FormatImageManifest], image-spec 1.1,
// manifest.md, "Guidelines for Artifact Usage"), the form that registries and other tools read.
// The config is the empty object {} unless [Builder.SetConfig] sets one. An artifact without layers
// has that object as its layer too.
//
// An OCI artifact manifest ([FormatArtifactManifest], image-spec 1.1.0-rc2, artifact.md) has blobs
// and no config. The released image-spec 1.1 does not have it, and most registries and tools refuse
// it. Choose it for artifacts that stay in local registries, or for readers that expect this form:
// in [BuilderOptions] for one artifact, or in [Options] for all builders of a registry.
// [LocalRegistry.Convert] writes an artifact in the other form, under another digest. Both forms
// are read, imported, exported and pulled in the same way, and [Manifest] is one view of both.
//
// # Promises
//
//   - A call that returned nil survives a power cut. Blobs and their directory are synced before
//     the index's transaction commits, and the commit is synced too.
//   - A call that failed, was cancelled or killed has changed no ref, or has made its whole change.
//   - A ref that resolves has its manifest, config and layers in place.
//   - Bytes that do not match their digest are never returned as good. A verified reader withholds
//     the last byte, and not only the end of the file.
//   - The bytes of a manifest never change. Builders write canonical bytes, so equal input gives an
//     equal digest.
//   - Imports write nothing outside the root and never change their source.
//   - The next process that writes removes all files that a killed process has left in tmp/.
//   - Files that this package did not make are never deleted, renamed or truncated.
//   - [LocalRegistry.GC] never deletes content that a ref needs, whatever other processes do.
//     Afterwards, all unneeded content is gone: replaced and removed artifacts, and blobs of killed
//     or failed publishes. An artifact whose subject is kept is kept too, unless
//     [GCOptions.DropReferrers] is set.
//   - Memory does not grow with the size of a blob or the number of refs. There are two exceptions:
//     a collection uses about 400 bytes for each blob, and a verification about 100.
//
// # Names in content
//
// The entries of an archive or layout have names in its index.json. The import of an entry depends
// on its name:
//
//   - A full name, such as ghcr.io/org/app:v1, becomes a ref. containerd writes it to the
//     annotation io.containerd.image.name, other tools to org.opencontainers.image.ref.name.
//   - A tag alone, as oras, skopeo and umoci write it, is [ErrBareName]. ImportOptions.Repository
//     completes all tags, and ImportOptions.Reference names one entry.
//   - A name with the digest of other content is kept as an annotation. It names nothing. The
//     entry's own digest alone names nothing either, until ImportOptions.Repository completes it.
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
// The platform and annotations of an entry of index.json are kept in the index of the registry:
// with the ref, or with the manifest if it got no ref. Exports of that ref or digest write them
// again. They belong to the content: a ref that moves loses them, unless the import that moves the
// ref has its own. Tag takes them from another ref of the same manifest. The first ref of content
// that was imported by digest takes them from there. ImportRegistry, Backup and Rebuild keep them,
// and Convert keeps the platform. Push, Pull and the handler do not keep them, because the
// distribution API has no place for them. urls and data are not kept.
//
// # Raw content
//
// [LocalRegistry.Repository] is a view of one name. By it, content is put, read and deleted as over
// the distribution API. It shows the content to which refs of the name lead and the content that it
// holds, and nothing else of the registry. A blob that was put is held for the repository, below
// tmp/, until it is too old. Every process sees it at once. It becomes durable with the manifest
// that needs it. A manifest that was put is durable with everything that it needs. A manifest
// without a tag is held by a row of the index. Holds keep content as refs do, until
// [GCOptions.Held] has passed and nothing else keeps the content.
//
// # Absent members
//
// An image index may name manifests of platforms that its archive leaves out, and an image may name
// foreign layers, which are not distributed with it (image-spec layer.md, "Non-Distributable
// Layers"). An import accepts both, and lists the missing content in [ImportResult.Absent]. The
// index records it as absent, once for the whole registry, so it is neither lost nor needed.
// Exports, backups, copies and pushes leave it out; a remote registry decides whether it accepts
// such an artifact. Reading absent content fails with [ErrAbsent]. A later import, or a pull of the
// same manifest, fills it in. A pull leaves out foreign layers that the remote registry does not
// have, but it requires every member of an index. The urls of foreign layers are never fetched. A
// mirror records content as absent until a client has asked for it: see [Upstream].
//
// # Errors
//
// Methods of a registry, and of builders, artifacts and remotes, return an [*Error] with the
// operation and its object. [errors.Is] finds the cause: a sentinel such as [ErrNotFound], an error
// of the file system or of the context, or an error of a reader, writer or function that the caller
// gave. [*ConflictError], [*RemoteError], [*SchemaError] and [*MissingSubjectError] have more
// facts. The text of an error may change.
//
// The documentation of a method lists the errors that are particular to it. In addition:
//   - A method that takes a context may return the context's error and, after Close, [ErrClosed].
//   - A method that reads the index may return [ErrCorruptIndex], [ErrIndexIO] and
//     [ErrForeignIndex].
//   - A method that reads or writes files may return any error of the file system.
//   - A method that writes may return [ErrReadOnly], [ErrNoSpace] and [ErrBusy].
//
// # Remote registries
//
// [LocalRegistry.Pull] and [LocalRegistry.Push] speak the OCI distribution-spec 1.1 over net/http,
// and [LocalRegistry.Load] pulls a missing artifact if [Options.Remote] is set. Blobs stream into
// and out of the store, several at a time. A blob that is already there is not sent again. A body
// that breaks off is resumed within the call. The next pull also resumes it, even after a kill.
// Content is used only after its digest was verified, and is published like all other content.
//
// Registries are not trusted. Everything that they send is bounded and checked before it is used. A
// credential goes only to its registry and to the token server that this registry may name. It is
// in no error, log or URL. A blob's redirect to another host is followed without it. A public
// registry cannot direct requests to a loopback, link-local or private address. [*RemoteError] has
// the facts of a failure, and a sentinel gives its kind.
//
// # Serving
//
// [LocalRegistry.Handler] serves a registry by the OCI distribution-spec 1.1 to any client: all of
// pull, push, discovery and deletion, without a daemon. Repository org/app of the server is
// localhost/org/app in the registry: see [HandlerOptions]. It passes the official conformance
// suite.
//
// Several processes can serve one root, while others build, import and collect in it. An upload is
// a file below tmp/, so a client can continue it in another process. Blobs are held for their
// repository as in [Repository.PutBlob].
//
// A manifest that was acknowledged is durable with all that it needs. Blobs are synced only then. A
// power cut may lose an acknowledged blob that no manifest names; a manifest that needs it is then
// refused, and the client sends the blob again.
//
// Nobody receives all bytes of a damaged blob. A large one is verified while it is sent: if it is
// damaged, the answer breaks off before its last byte. A small one, and one of which a range is
// asked for, is verified before. A handle does not verify a file again that has not changed.
//
// Apart from old uploads, the handler deletes only what clients delete. Content that no tag needs
// any more takes space until a collection: call [LocalRegistry.GC] now and then, in any process.
// To stop a server, call Shutdown of the [net/http.Server] first, and [LocalRegistry.Close] then.
// After Close, requests are answered with 503.
//
// With an [Upstream] the handler is a mirror. It fetches each manifest and blob when a client first
// asks for it, once for all clients, and sends a large blob while it arrives. While the other
// registry is down, it serves what it has, and answers 502 for the rest. It fetches content again
// that was damaged or lost here. Docker uses it by registry-mirrors, for Docker Hub alone,
// containerd by hosts.toml, and podman, buildah and skopeo by registries.conf. containerd names the
// registry in the query: a [HandlerOptions.Name] that reads ns lets one handler mirror several
// registries.
//
// The zero HandlerOptions are for tests and for programs of one user. Before other machines can
// reach the handler, set:
//   - [HandlerOptions.Authorize] or [HandlerOptions.ReadOnly]. Without them everybody may push and
//     delete, and everybody who knows the digest of a blob may mount it from any repository.
//   - [HandlerOptions.MaxBlobSize] and [HandlerOptions.MaxUploads]. Only a quota of the file system
//     bounds what clients can make the registry store in all, by pushes or through a mirror.
//   - For a mirror, [Upstream].MaxBytes, and a root that has no content which only some of the
//     clients may read. A manifest of the upstream may name any digest. If this registry has that
//     content, whoever may pull the manifest gets it. [Options.SeparateRegistries] keeps apart what
//     other registries have sent, but not the repositories of one registry. The credentials of
//     [Upstream].Remote serve every client that may pull here. A [HandlerOptions.Name] that reads
//     ns must refuse registries that it does not know, since a client may name any.
//   - ReadHeaderTimeout, IdleTimeout and MaxHeaderBytes of the [net/http.Server], and TLS. Leave
//     its ReadTimeout and WriteTimeout zero: the handler sets the same deadlines, by progress
//     instead of in all. See [HandlerOptions.StallTimeout].
//   - A limit of connections, in a proxy or listener. A request needs a few MiB of memory, however
//     large the blob is. The handler parses at most four large manifests at a time, and does not
//     limit the number of requests.
//   - [Options.Logger]. Clients are not told why the server failed; the log is.
//
// A handler around this one must let [net/http.ErrAbortHandler] pass, and must not change bodies.
// Its [net/http.ResponseWriter] needs an Unwrap method: see [net/http.ResponseController].
//
// # Upkeep
//
// [LocalRegistry.GC] deletes the content to which no ref leads; [LocalRegistry.GCReport] counts it.
// [LocalRegistry.Verify] compares index, files and digests. [LocalRegistry.Repair] restores damaged
// and missing content as far as it can be found, and [Rebuild] a lost index. [LocalRegistry.Backup]
// copies a live registry as it is at one moment. [LocalRegistry.Stats], [LocalRegistry.RefUsage]
// and [LocalRegistry.RepositoryUsage] count from the index.
//
// # Sharing
//
// Every method may be called from any number of goroutines. A root may be open many times, in one
// process or in many on the same machine. If two calls write one ref, the policy decides: under
// [KeepExisting] one wins and the other gets a [*ConflictError], and under [Replace] the last
// commit wins. A write waits for other processes up to [Options.BusyTimeout]. A call checks its
// context between steps, so it returns soon after the context ends. It finishes an fsync or commit
// first.
//
// # Caveats
//
//   - Network file systems are not safe for SQLite's WAL. On Linux they are recognised and refused,
//     unless [Options.AllowNetworkFS] is set.
//   - [OpenReadOnly] on a directory that this process may not write assumes that no other process
//     writes to it while it is open.
//   - SQLite trusts the files beside a database. So before each connection to any database there
//     must be no journal, and -wal and -shm must be regular files that belong to the database's
//     owner, to this user or to root. Otherwise the call fails with [ErrForeignIndex]. The log of
//     another registry is noticed; an old log of the same registry is not.
//   - On Windows, directories cannot be synced. Names rely on NTFS's journal there.
//
// # Limits
//
//   - [MaxManifestSize]: bytes of a manifest or image index
//   - [MaxImportManifests]: bytes of all manifests of an import or pull
//   - [MaxClosure]: blobs of an artifact
//   - [MaxIndexNesting]: depth of nested image indexes
//   - [MaxJSONDepth]: depth of JSON
//   - [MaxArchiveEntries]: entries of an archive
//
// Blobs have no limit. An import uses about 2 KB of memory for each of its blobs.
package ocilocal
