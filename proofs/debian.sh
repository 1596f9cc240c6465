# shellcheck shell=sh
# Roots of Debian releases, for the proofs that build in one. After proofs/lib.sh:
#
#     . "$here/proofs/debian.sh"

# The addresses of Debian's archive and of its security updates, as apt here knows them.
archive() { # PATTERN OF AWK
    # shellcheck disable=SC2016  # apt expands it
    apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' 'Created-By: Packages' |
        awk '$2 == "main" && '"$1"' { print $1; exit }'
}

# Makes a root with nothing in it but what a release has at least.
create_root() { # RELEASE ROOT
    need debootstrap
    from=$(archive '$1 !~ /security/')
    [ -n "$from" ] || fail "apt does not know where its packages come from"
    rm -rf "$2"
    mkdir -p "$2"
    # An older debootstrap has not heard of a newer release, which is made like all of them.
    scripts=/usr/share/debootstrap/scripts
    script=$scripts/$1
    [ -e "$script" ] || script=$scripts/sid
    debootstrap --variant=minbase --include=ca-certificates "$1" "$2" "$from" "$script" \
        >"$2.log" 2>&1 ||
        { tail -n 20 "$2.log" >&2; fail "no root of $1"; }
    # A mirror may be behind, and these roots serve nothing but this.
    printf '%s\n' 'APT::Install-Recommends "false";' 'Acquire::Check-Valid-Until "false";' \
        >"$2/etc/apt/apt.conf.d/90proofs"
    touch "$2/.complete"
}

# Mounts what programs expect, in a namespace of this process's own.
mount_root() { # ROOT
    mount --bind "$1" "$1"
    mount -t proc proc "$1/proc"
    mount --rbind /dev "$1/dev"
    cp /etc/resolv.conf "$1/etc/resolv.conf"
}
