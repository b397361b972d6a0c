package ocilocal

var (
	ReferenceFromKey = referenceFromKey
	ReferenceKey     = Reference.key
	CheckTag         = checkTag
	IsBareTag        = isBareTag
)
