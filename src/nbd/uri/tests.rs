use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Uri {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn refusal(text: &str) -> InvalidUri {
    match text.parse::<Uri>() {
        Ok(uri) => panic!("{text} was taken as {uri:?}"),
        Err(error) => error,
    }
}

fn tcp_at(host: &str, port: u16) -> Endpoint {
    Endpoint::Tcp {
        host: host.into(),
        port,
    }
}

#[test]
fn hosts_and_ports() {
    for (text, host, port) in [
        ("nbd://example.com", "example.com", 10809),
        ("nbds://example.com/", "example.com", 10809),
        ("nbds://example.com:/", "example.com", 10809),
        ("NBDS://example.com:1/x", "example.com", 1),
        ("nbds://192.0.2.1:65535/x", "192.0.2.1", 65535),
        ("nbds://[2001:db8::1]/x", "2001:db8::1", 10809),
        ("nbds://[::1]:5000", "::1", 5000),
        ("nbds://[fe80::1%25eth0]:5000", "fe80::1%eth0", 5000),
        ("nbds://my_host", "my_host", 10809),
    ] {
        let uri = parse(text);
        assert_eq!(uri.endpoint, tcp_at(host, port), "{text}");
        assert_eq!(uri.tls, !text.starts_with("nbd:"), "{text}");
        assert_eq!(uri.server_name(), Some(host));
    }
}

#[test]
fn the_specification_s_examples_of_export_names() {
    for (text, export) in [
        ("nbd://example.com/disk", "disk"),
        ("nbd+unix:///disk?socket=sock", "disk"),
        ("nbd://example.com/", ""),
        ("nbd://example.com", ""),
        ("nbd://example.com//disk", "/disk"),
        ("nbd://example.com/hello%20world", "hello world"),
        ("nbd://example.com?tls-hostname=a", ""),
        ("nbd://example.com/a/b:c@d", "a/b:c@d"),
        ("nbd://example.com/%e2%82%ac", "€"),
        ("nbd://example.com/a+b", "a+b"),
    ] {
        assert_eq!(parse(text).export.as_str(), export, "{text}");
    }
}

#[test]
fn unix_sockets_and_tls() {
    let uri = parse("nbds+unix://alice@/?socket=/tmp/nbd.sock&tls-certificates=certs");
    assert_eq!(uri.endpoint, Endpoint::Unix("/tmp/nbd.sock".into()));
    assert_eq!(uri.user.as_deref(), Some("alice"));
    assert_eq!(uri.certificates, Some("certs".into()));
    assert_eq!(uri.server_name(), None);
    assert!(uri.tls);

    let uri = parse("nbds+unix:///disk?tls-hostname=server.test&socket=%00/abstract");
    assert_eq!(uri.endpoint, Endpoint::Unix("\0/abstract".into()));
    assert_eq!(uri.server_name(), Some("server.test"));

    let uri = parse("nbds://10.0.0.1/?tls-type=x509&tls-verify-peer=1&tls-hostname=server.test");
    assert_eq!(uri.server_name(), Some("server.test"));
}

#[test]
fn what_cannot_be_honoured_is_refused() {
    use InvalidUri as E;
    let long = format!("nbds://h/{}", "x".repeat(4097));
    for (text, error) in [
        ("", E::Scheme),
        ("localhost:10809", E::Scheme),
        ("nbd:example.com", E::Scheme),
        ("http://example.com", E::Scheme),
        ("nbds+vsock://2/", E::Vsock),
        ("nbd://h/a b", E::Character(' ')),
        ("nbd://h/\u{1b}[2J", E::Character('\u{1b}')),
        ("nbd://h/€", E::Character('€')),
        ("nbd://h/%zz", E::PercentEncoding),
        ("nbd://h/%+1", E::PercentEncoding),
        ("nbd://h/%a", E::PercentEncoding),
        ("nbd://h/a%00b", E::Export),
        ("nbd://h/%ff", E::Export),
        (&long, E::Export),
        ("nbd://h/a#b", E::Fragment),
        ("nbd:///disk", E::NoHost),
        ("nbd://:10809/disk", E::NoHost),
        ("nbd://::1/disk", E::NoHost),
        ("nbd://fe80::1/", E::Port(":1".into())),
        ("nbd://[::1/disk", E::Host("[::1".into())),
        ("nbd://[1.2.3.4]/", E::Host("[1.2.3.4]".into())),
        ("nbd://[::1]10809/", E::Host("[::1]10809".into())),
        ("nbd://a%20b/", E::Host("a%20b".into())),
        ("nbd://h:0/", E::Port("0".into())),
        ("nbd://h:65536/", E::Port("65536".into())),
        ("nbd://h:+1/", E::Port("+1".into())),
        ("nbd+unix://disk?socket=s", E::HostOfSocket("disk".into())),
        ("nbd+unix:///disk", E::NoSocket),
        ("nbd+unix:///disk?socket=", E::Empty("socket")),
        ("nbd+unix:///disk?socket=%00", E::Text("socket")),
        ("nbd+unix:///disk?socket=a%00b", E::Text("socket")),
        ("nbd+unix:///disk?socket=a&socket=b", E::Twice("socket")),
        ("nbd://h/?socket=s", E::Socket),
        ("nbds://h/?tls-hostname=", E::Empty("tls-hostname")),
        ("nbds://h/?tls-certificates", E::Empty("tls-certificates")),
        ("nbds://h/?tls-psk-file=keys", E::PreSharedKey),
        ("nbds://h/?tls-username=alice", E::PreSharedKey),
        ("nbds://h/?tls-type=psk", E::PreSharedKey),
        ("nbds://h/?tls-type=anon", E::Anonymous),
        ("nbds://h/?tls-type=x", E::TlsType("x".into())),
        ("nbds://h/?tls-verify-peer=0", E::UncheckedPeer),
        ("nbds://h/?tls-verify-peer=false", E::UncheckedPeer),
        ("nbds://h/?tls-verify-peer=no", E::VerifyPeer("no".into())),
        (
            "nbds://h/?tls-hostnam=a",
            E::Parameter("tls-hostnam".into()),
        ),
    ] {
        assert_eq!(refusal(text), error, "{text}");
        let message = error.to_string();
        assert!(!message.contains(char::is_control), "{message:?}");
    }
}

#[test]
fn display_is_one_spelling() {
    for (text, display) in [
        ("NBD://h", "nbd://h/"),
        ("nbds://[::1]:10809/a%2fb?", "nbds://[::1]/a/b"),
        ("nbds://[fe80::1%25lo]:9/", "nbds://[fe80::1%25lo]:9/"),
        (
            "nbds+unix://a%40b@/x?tls-hostname=n&socket=/a%20b",
            "nbds+unix://a%40b@/x?socket=/a%20b&tls-hostname=n",
        ),
    ] {
        assert_eq!(parse(text).to_string(), display);
    }
    assert_eq!(tcp_at("::1", 1).to_string(), "[::1]:1");
    assert_eq!(
        Endpoint::Unix("a\nb".into()).to_string(),
        "unix:a\\nb",
        "never a control character"
    );
}

fn endpoints() -> impl Strategy<Value = Endpoint> {
    let socket = prop::collection::vec(1..=u8::MAX, 1..40)
        .prop_map(|bytes| Endpoint::Unix(OsString::from_vec(bytes).into()));
    let tcp = (
        prop_oneof![
            "[a-z0-9._-]{1,40}",
            any::<[u16; 8]>().prop_map(|parts| Ipv6Addr::from(parts).to_string()),
        ],
        1..=u16::MAX,
    )
        .prop_map(|(host, port)| Endpoint::Tcp { host, port });
    prop_oneof![socket, tcp]
}

fn without_nul(text: &str) -> String {
    text.replace('\0', "")
}

proptest! {
    #[test]
    fn no_text_is_a_panic(text in "(nbds?(\\+unix)?://)?\\PC{0,80}") {
        let _ = text.parse::<Uri>();
    }

    #[test]
    fn what_looks_like_a_uri_is_a_uri_or_refused(
        text in "nbds?(\\+unix)?://[a-z@:%0-9\\[\\]]{0,20}(/[a-z%0-9/]{0,20})?(\\?(socket|tls-hostname|tls-type)=[a-z%0-9&=]{0,20})?",
    ) {
        if let Ok(uri) = text.parse::<Uri>() {
            prop_assert_eq!(uri.to_string().parse::<Uri>(), Ok(uri));
        }
    }

    #[test]
    fn display_and_parse_are_inverse(
        tls: bool,
        endpoint in endpoints(),
        export in any::<String>(),
        user in prop::option::of("\\PC{1,20}"),
        certificates in prop::option::of("[^\0]{1,40}"),
        hostname in prop::option::of("[^\0]{1,40}"),
    ) {
        let uri = Uri {
            tls,
            endpoint,
            export: ExportName::try_from(without_nul(&export).as_str()).unwrap(),
            user,
            certificates: certificates.map(PathBuf::from),
            hostname,
        };
        prop_assert_eq!(uri.to_string().parse::<Uri>(), Ok(uri));
    }
}
