# Writes a layout directory with two small artifacts that every run makes byte for byte alike:
# an image for one platform under the tag v1, and an index of two platforms under the tag multi.
import gzip
import hashlib
import io
import json
import os
import sys
import tarfile

root = sys.argv[1]
os.makedirs(root + "/blobs/sha256")


def put(data):
    digest = hashlib.sha256(data).hexdigest()
    with open(f"{root}/blobs/sha256/{digest}", "wb") as f:
        f.write(data)
    return {"digest": "sha256:" + digest, "size": len(data)}


def doc(value):
    return put(json.dumps(value, separators=(",", ":")).encode())


def image(arch):
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as t:
        entry = tarfile.TarInfo("hello")
        entry.size = 6
        t.addfile(entry, io.BytesIO(b"hello\n"))
    config = doc({
        "architecture": arch, "os": "linux", "config": {"Cmd": ["/hello"]},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(plain.getvalue()).hexdigest()]},
    })
    layer = put(gzip.compress(plain.getvalue(), mtime=0))
    return doc({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **config},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **layer}],
    })


manifest_type = "application/vnd.oci.image.manifest.v1+json"
amd64, arm64 = image("amd64"), image("arm64")
multi = doc({
    "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
    "manifests": [
        {"mediaType": manifest_type, **amd64, "platform": {"architecture": "amd64", "os": "linux"}},
        {"mediaType": manifest_type, **arm64, "platform": {"architecture": "arm64", "os": "linux"}},
    ],
})
name = "org.opencontainers.image.ref.name"
with open(root + "/index.json", "w") as f:
    json.dump({"schemaVersion": 2, "manifests": [
        {"mediaType": manifest_type, **amd64, "annotations": {name: "v1"}},
        {"mediaType": "application/vnd.oci.image.index.v1+json", **multi, "annotations": {name: "multi"}},
    ]}, f)
with open(root + "/oci-layout", "w") as f:
    f.write('{"imageLayoutVersion":"1.0.0"}')
