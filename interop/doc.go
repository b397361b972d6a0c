// Package interop runs other people's tools and registries against ocilocal:
// what they write must come in with the digest they tell, and what goes out must
// be accepted by them. It has tests only, in a module of its own, so that nothing
// it needs becomes a dependency of the library.
//
// The script setup gets the programs. A test whose program is missing is skipped,
// and the end of the run names the programs that were missing. OCILOCAL_INTEROP_REQUIRE
// (1 for all, or names of programs) makes a missing one a failure.
package interop
