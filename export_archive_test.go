package ocilocal

// WriteEntry writes one file of an archive.
var WriteEntry = writeEntry
