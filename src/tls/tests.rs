use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::{ClientConfig, ClientConnection, ServerConnection};
use rustls_pki_types::ServerName;
use tempfile::TempDir;
use time::{Duration, OffsetDateTime};

use super::*;
use crate::volumes::VolumeId;

type Parts = BTreeMap<String, Vec<u8>>;

fn volume() -> VolumeId {
    VolumeId::from_bytes([7; 16])
}

fn server_parts(authority: &Authority) -> Parts {
    authority.issue_server(&volume(), &[]).unwrap()
}

fn client_parts(authority: &Authority) -> Parts {
    authority.issue_client(&volume()).unwrap()
}

fn client_secret(parts: &Parts) -> Result<Secret, CertificateError> {
    Secret::from_map("the client Secret", parts, Side::Client)
}

fn issue(authority: &Authority, side: Side, from: i64, to: i64) -> Parts {
    let now = OffsetDateTime::now_utc();
    let mut leaf = Leaf::new(side, vec![client_identity(&volume())]);
    leaf.not_before = now + Duration::seconds(from);
    leaf.not_after = now + Duration::seconds(to);
    authority.issue(&leaf).unwrap()
}

fn options() -> ServerOptions {
    ServerOptions {
        tls12: false,
        clients: vec![client_identity(&volume())],
    }
}

fn served(parts: &Parts) -> (TempDir, ServerTls) {
    let directory = TempDir::new().unwrap();
    write_secret(directory.path(), parts).unwrap();
    let tls = ServerTls::load(directory.path(), options()).unwrap();
    (directory, tls)
}

/// Moves records between the two until neither has more to say, or one refuses.
fn handshake(tls: &ServerTls, config: Arc<ClientConfig>, name: &str) -> Result<(), String> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(config, name).unwrap();
    let mut server = ServerConnection::new(tls.config()).unwrap();
    for _ in 0..8 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut rest: &[u8] = &wire;
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            if let Err(error) = server.process_new_packets() {
                let mut alert = Vec::new();
                while server.wants_write() {
                    server.write_tls(&mut alert).unwrap();
                }
                let mut alert: &[u8] = &alert;
                while !alert.is_empty() {
                    client.read_tls(&mut alert).unwrap();
                }
                let seen = client
                    .process_new_packets()
                    .expect_err("the client hears of the refusal");
                return Err(format!("{} / {}", explain(&error), explain(&seen)));
            }
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut rest: &[u8] = &wire;
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client
                .process_new_packets()
                .map_err(|error| explain(&error))?;
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    assert_eq!(
        client.protocol_version(),
        Some(rustls::ProtocolVersion::TLSv1_3)
    );
    Ok(())
}

fn says(result: Result<impl std::fmt::Debug, impl ToString>, words: &str) {
    let message = result.expect_err(words).to_string();
    assert!(message.contains(words), "{message:?} lacks {words:?}");
}

#[test]
fn both_sides_of_a_volume_agree() {
    let authority = Authority::temporary().unwrap();
    let (_directory, tls) = served(&server_parts(&authority));
    let secret = client_secret(&client_parts(&authority)).unwrap();
    secret.check_identity(&client_identity(&volume())).unwrap();
    secret.check_issuer().unwrap();
    for profile in [Profile::Kernel, Profile::Probe] {
        let config = client_config(&secret, profile).unwrap();
        handshake(&tls, config, &server_identity(&volume())).unwrap();
    }
}

#[test]
fn c27_clients_that_may_not_enter_are_refused_inside_the_handshake() {
    let authority = Authority::temporary().unwrap();
    let (_directory, tls) = served(&server_parts(&authority));
    let ours = client_secret(&client_parts(&authority)).unwrap();
    let name = server_identity(&volume());
    let enter = |config| handshake(&tls, config, &name);

    says(
        enter(anonymous_client_config(&ours).unwrap()),
        "presented no certificate",
    );
    let foreign = client_secret(&client_parts(&Authority::temporary().unwrap())).unwrap();
    let foreign = foreign.trusting(&ours);
    says(
        enter(client_config(&foreign, Profile::Probe).unwrap()),
        "not issued by an authority in ca.crt",
    );
    let other = VolumeId::from_bytes([8; 16]);
    let other = client_secret(&authority.issue_client(&other).unwrap()).unwrap();
    says(
        enter(client_config(&other, Profile::Probe).unwrap()),
        "but vol-07070707070707070707070707070707.client.hawser.dev is needed",
    );
}

#[test]
fn c27_a_certificate_that_has_ended_is_shown_only_on_purpose() {
    let authority = Authority::temporary().unwrap();
    let (_directory, tls) = served(&server_parts(&authority));
    let directory = TempDir::new().unwrap();
    let ended = issue(&authority, Side::Client, -7200, -3600);
    write_secret(directory.path(), &ended).unwrap();
    says(Secret::load(directory.path(), Side::Client), "ended at");
    let ended = Secret::load_expired(directory.path(), Side::Client).unwrap();
    let config = client_config(&ended, Profile::Probe).unwrap();
    says(
        handshake(&tls, config, &server_identity(&volume())),
        "ended at",
    );
    write_secret(directory.path(), &client_parts(&authority)).unwrap();
    says(
        Secret::load_expired(directory.path(), Side::Client),
        "one that has expired is needed",
    );
}

#[test]
fn a_server_of_another_volume_is_refused() {
    let authority = Authority::temporary().unwrap();
    let (_directory, tls) = served(&server_parts(&authority));
    let secret = client_secret(&client_parts(&authority)).unwrap();
    let config = client_config(&secret, Profile::Kernel).unwrap();
    let other = server_identity(&VolumeId::from_bytes([8; 16]));
    says(
        handshake(&tls, config, &other),
        "but vol-08080808080808080808080808080808.server.hawser.dev is needed",
    );
}

#[test]
fn each_way_a_certificate_can_be_wrong_has_its_own_words() {
    let authority = Authority::temporary().unwrap();
    let good = client_parts(&authority);
    let with = |part: &str, bytes: Vec<u8>| {
        let mut parts = good.clone();
        parts.insert(part.to_owned(), bytes);
        client_secret(&parts)
    };
    let other = client_parts(&authority);
    says(
        client_secret(&issue(&authority, Side::Client, -100, -50)),
        "renew it",
    );
    says(
        client_secret(&issue(&authority, Side::Client, 50, 100)),
        "not valid before",
    );
    says(
        client_secret(&issue(&authority, Side::Server, -100, 100)),
        "may not be used for clientAuth",
    );
    says(
        with(KEY, other[KEY].clone()),
        "does not belong to its certificate",
    );
    says(
        with(CERTIFICATE, b"garbage".to_vec()),
        "holds no certificate",
    );
    says(with(KEY, b"garbage".to_vec()), "holds no private key");
    says(
        with(AUTHORITIES, vec![b'x'; 300 << 10]),
        "longer than 262144 bytes",
    );
    says(with(AUTHORITIES, Vec::new()), "has no ca.crt");
    for part in [CERTIFICATE, KEY, AUTHORITIES] {
        let mut parts = good.clone();
        parts.remove(part);
        says(client_secret(&parts), &format!("has no {part}"));
    }
    let secret = client_secret(&good).unwrap();
    says(
        secret.check_identity("somebody.else"),
        "is for vol-07070707070707070707070707070707.client.hawser.dev, but somebody.else",
    );
    let stranger = client_parts(&Authority::temporary().unwrap());
    let foreign = with(AUTHORITIES, stranger[AUTHORITIES].clone()).unwrap();
    says(foreign.check_issuer(), "not issued by an authority");
    let server = server_parts(&authority);
    let server = Secret::from_map("the server Secret", &server, Side::Server).unwrap();
    server.check_issuer().unwrap();
    says(
        client_config(&server, Profile::Kernel),
        "may not be used for clientAuth",
    );
}

#[test]
fn keys_are_never_shown() {
    let authority = Authority::temporary().unwrap();
    let parts = client_parts(&authority);
    let secret = client_secret(&parts).unwrap();
    let shown = format!("{secret:?} {authority:?}");
    let key = String::from_utf8(parts[KEY].clone()).unwrap();
    for line in key.lines() {
        assert!(!shown.contains(line));
    }
}

#[test]
fn an_authority_is_kept_and_refused_when_it_was_damaged() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("ca");
    let first = Authority::open(&path).unwrap();
    let again = Authority::open(&path).unwrap();
    let (_served, tls) = served(&server_parts(&first));
    let secret = client_secret(&client_parts(&again)).unwrap();
    let config = client_config(&secret, Profile::Probe).unwrap();
    handshake(&tls, config, &server_identity(&volume())).unwrap();

    let leaf = server_parts(&first);
    write_secret(&path, &leaf).unwrap();
    says(Authority::open(&path), "not a certificate authority's");
    let mut mixed = Parts::new();
    let (_, other) = (
        Authority::open(&directory.path().join("b")).unwrap(),
        directory.path().join("b"),
    );
    mixed.insert(KEY.into(), std::fs::read(other.join(KEY)).unwrap());
    mixed.insert(CERTIFICATE.into(), first_certificate(&leaf));
    write_secret(&path, &mixed).unwrap();
    says(Authority::open(&path), "does not belong");
    mixed.remove(KEY);
    write_secret(&path, &mixed).unwrap();
    says(Authority::open(&path), "has no tls.key");
}

/// The authority's own certificate, as a leaf's Secret carries it.
fn first_certificate(leaf: &Parts) -> Vec<u8> {
    leaf[AUTHORITIES].clone()
}

#[test]
fn a_directory_may_have_qemu_s_names() {
    let directory = TempDir::new().unwrap();
    let parts = client_parts(&Authority::temporary().unwrap());
    for (name, alias) in Side::Client.parts() {
        std::fs::write(directory.path().join(alias), &parts[name]).unwrap();
    }
    Secret::load(directory.path(), Side::Client).unwrap();
    says(
        Secret::load(directory.path(), Side::Server),
        "it needs tls.crt or server-cert.pem",
    );
    says(
        Secret::load(&directory.path().join("absent"), Side::Client),
        "cannot read",
    );
}

#[test]
fn a_server_follows_its_files_and_keeps_what_works() {
    let authority = Authority::temporary().unwrap();
    let (directory, tls) = served(&server_parts(&authority));
    assert_eq!(tls.refresh(), Refresh::Unchanged);
    let before = tls.config();

    let longer = OffsetDateTime::now_utc() + Duration::days(300);
    let mut leaf = Leaf::new(Side::Server, vec![server_identity(&volume())]);
    leaf.not_after = longer;
    write_secret(directory.path(), &authority.issue(&leaf).unwrap()).unwrap();
    assert_eq!(tls.refresh(), Refresh::Reloaded);
    assert!(!Arc::ptr_eq(&before, &tls.config()));
    assert_eq!(tls.not_after(), longer.unix_timestamp());

    write_secret(
        directory.path(),
        &issue(&authority, Side::Server, -100, -50),
    )
    .unwrap();
    let Refresh::Kept(problem) = tls.refresh() else {
        panic!("an expired certificate was taken")
    };
    assert!(problem.contains("renew it"), "{problem}");
    assert_eq!(tls.problem(), Some(problem));
    assert_eq!(tls.not_after(), longer.unix_timestamp());
    write_secret(directory.path(), &server_parts(&authority)).unwrap();
    assert_eq!(tls.refresh(), Refresh::Reloaded);
    assert_eq!(tls.problem(), None);
}

fn entries(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = std::fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

#[test]
fn writing_a_secret_replaces_all_of_it_and_leaves_nothing_behind() {
    use std::os::unix::fs::PermissionsExt;
    let directory = TempDir::new().unwrap();
    let secret = directory.path().join("secret");
    let parts = client_parts(&Authority::temporary().unwrap());
    for _ in 0..3 {
        write_secret(&secret, &parts).unwrap();
    }
    let names = entries(&secret).unwrap();
    assert_eq!(names.len(), 5, "{names:?}");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&secret), 0o700);
    assert_eq!(mode(&secret.join(KEY)), 0o600);
    Secret::load(&secret, Side::Client).unwrap();
}
