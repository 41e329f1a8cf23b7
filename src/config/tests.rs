//! t
#[test]
fn print_sample() {
    let mut out = String::new();
    for section in super::keys::sections() {
        out.push_str(&format!("\n{}[{section}]\n", if section.starts_with("backend") { "#" } else { "" }));
        for key in super::keys::of_section(section) {
            let mut text = key.about.to_string();
            match key.need {
                super::Need::Required => text = format!("REQUIRED. {text}"),
                super::Need::Password | super::Need::ApplicationCredential => {
                    text = format!("REQUIRED for this way to log in. {text}")
                }
                _ => {}
            }
            let mut line = String::from("#");
            let allowed = key.allowed();
            let kind = match key.kind {
                super::Kind::Text
                | super::Kind::Secret
                | super::Kind::Word
                | super::Kind::TransportUrl
                | super::Kind::HttpUrl
                | super::Kind::Pool
                | super::Kind::CephUser => String::new(),
                _ => {
                    let mut c = allowed.chars();
                    format!(" {}{}.", c.next().unwrap().to_uppercase(), c.as_str())
                }
            };
            let text = format!("{text}{kind}");
            out.push('\n');
            for word in text.split(' ') {
                if line.len() + 1 + word.len() > 100 {
                    out.push_str(&line);
                    out.push('\n');
                    line = "#".into();
                }
                line.push(' ');
                line.push_str(word);
            }
            out.push_str(&line);
            out.push('\n');
            out.push_str(&format!("#{} ={}{}\n", key.name, if key.default.is_empty() { "" } else { " " }, key.default));
        }
    }
    std::fs::write("/tmp/sample.conf", out).unwrap();
}
