#!/bin/sh
# Packs the files of a directory as an archive of a release, which c_src/prebuilt.sh takes a library from:
#
#     tools/archive.sh DIRECTORY ARCHIVE
#
# By their bare names, and with the same bytes for the same files.
set -eu

# shellcheck disable=SC2046  # names of ours, without spaces
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$1" -cf - $(ls "$1") |
    gzip -n -9 >"$2"
