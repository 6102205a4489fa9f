use super::*;

#[test]
fn names_are_taken_and_everything_else_is_refused() {
    let name = |text: &str| wanted(CONNECT, 3, text.as_bytes());
    assert_eq!(name("ByronWade.local"), Ok("byronwade.local".parse().unwrap()));
    assert_eq!(name("byronwade.local."), Ok("byronwade.local".parse().unwrap()));
    for address in ["127.0.0.1", "::1"] {
        assert_eq!(name(address), Err(Reply::NotAllowed), "no exit, also when written out");
    }
    assert_eq!(wanted(CONNECT, 1, &[127, 0, 0, 1]), Err(Reply::NotAllowed));
    assert_eq!(wanted(CONNECT, 4, b"local.local.loca"), Err(Reply::NotAllowed));
    for wrong in ["", "a..b", "a b", "-a"] {
        assert_eq!(name(wrong), Err(Reply::UnknownName));
    }
    assert_eq!(wanted(CONNECT, 3, &[0xff]), Err(Reply::UnknownName));
    for command in [0, 2, 3, 9] {
        assert_eq!(wanted(command, 3, b"a.local"), Err(Reply::CommandNotSupported));
    }
}

#[tokio::test]
async fn an_address_that_is_taken_is_no_proxy_and_no_error() {
    assert!(listen("").await.is_none());
    let taken = listen("127.0.0.1:0").await.unwrap();
    assert!(listen(&taken.local_addr().unwrap().to_string()).await.is_none());
}
