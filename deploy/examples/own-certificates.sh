#!/bin/sh
# Makes the Secrets of a claim's volume, for own-certificates.yaml: own-certificates.sh CLAIM [NAMESPACE]
#
# The authority is made here, in the folder `authority`, where there is none; with yours, put its ca.crt and ca.key there. Run it
# again before the certificates end: the contents of the Secrets are replaced, and no session is closed.
set -eu

claim=$1
namespace=${2:-default}
driver=hawser-system

# A volume is called after its PersistentVolume, and that after its claim.
uid=$(kubectl -n "$namespace" get pvc "$claim" -o jsonpath='{.metadata.uid}')
pv=pvc-$uid
volume=vol-$(printf %s "$pv" | sha256sum | cut -c 1-32)

umask 077
mkdir -p authority
new="openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 365"
[ -e authority/ca.crt ] || $new -subj '/CN=volumes' -keyout authority/ca.key -out authority/ca.crt

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# secret NAME SIDE USAGE
secret() {
    $new -CA authority/ca.crt -CAkey authority/ca.key -subj "/CN=$2" \
        -addext basicConstraints=critical,CA:FALSE -addext "extendedKeyUsage=$3" \
        -addext "subjectAltName=DNS:$volume.$2.hawser.dev" \
        -keyout "$work/tls.key" -out "$work/tls.crt" 2>/dev/null
    kubectl create secret generic "$1" --type=kubernetes.io/tls --dry-run=client -o yaml \
        --from-file="$work/tls.crt" --from-file="$work/tls.key" --from-file=authority/ca.crt |
        kubectl -n "$driver" apply --server-side --force-conflicts -f -
}
secret "$volume-server" server serverAuth
secret "$pv-hawser-client" client clientAuth
