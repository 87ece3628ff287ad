#!/usr/bin/env bash
#
# Makes what keeps strangers out of a cluster: ca.pem, cert.pem and key.pem, in a new folder.
#
#   make_certificates.sh FOLDER NAME...
#   make_certificates.sh tls localhost 127.0.0.1 head.example.org 10.0.0.5
#
# NAMEs are the hosts and IP addresses of scheduler, workers and clients; *.example.org stands
# for all hosts of a domain. Scheduler, workers and clients use the same certificate: who holds
# key.pem can run code on the cluster. The authority's own key is not kept, so nobody can make a
# further certificate. To renew, make a new folder and restart the cluster with it.
#
# DAYS=365 in the environment says how long they are valid.
set -euo pipefail

if (($# < 2)); then
  echo "usage: ${0##*/} FOLDER NAME..." >&2
  exit 2
fi
folder=$1
shift

names=()
for name in "$@"; do
  if [[ $name =~ ^[0-9]+(\.[0-9]+){3}$ || $name =~ ^[0-9A-Fa-f:]*:[0-9A-Fa-f:]*$ ]]; then
    names+=("IP:$name")
  elif [[ $name =~ ^(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$ ]]; then
    names+=("DNS:$name")
  else
    echo "${0##*/}: $name is neither a host name nor an IP address" >&2
    exit 2
  fi
done
days=${DAYS:-365}

for file in ca.pem cert.pem key.pem; do
  if [[ -e $folder/$file ]]; then
    echo "${0##*/}: $folder/$file exists and is not overwritten; name another folder" >&2
    exit 1
  fi
done

umask 077
mkdir -p "$folder"
work=$(mktemp -d "$folder/.making.XXXXXX")
trap 'rm -rf "$work"' EXIT

new=(openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256)
"${new[@]}" -x509 -days "$days" -subj "/CN=lkarray cluster authority" \
  -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
  -addext "keyUsage=critical,keyCertSign,cRLSign" \
  -keyout "$work/ca-key.pem" -out "$work/ca.pem" 2>/dev/null
"${new[@]}" -subj "/CN=lkarray cluster" -keyout "$work/key.pem" -out "$work/request.pem" 2>/dev/null
cat >"$work/extensions" <<END
basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=serverAuth,clientAuth
subjectAltName=$(IFS=,; echo "${names[*]}")
END
openssl x509 -req -sha256 -days "$days" -in "$work/request.pem" -extfile "$work/extensions" \
  -CA "$work/ca.pem" -CAkey "$work/ca-key.pem" -CAcreateserial -out "$work/cert.pem" 2>/dev/null
openssl verify -CAfile "$work/ca.pem" "$work/cert.pem" >/dev/null

chmod 644 "$work/ca.pem" "$work/cert.pem"
chmod 600 "$work/key.pem"
mv "$work/ca.pem" "$work/cert.pem" "$work/key.pem" "$folder/"
echo "$folder: ca.pem, cert.pem and key.pem for ${names[*]}, valid for $days days"
