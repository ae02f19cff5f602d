//! What `--namespace` says: an image, and behind it how it is shown.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use uuid::Uuid;
use zbdkit_block::did_you_mean;

use crate::output::Usage;

/// How an image is shown as a namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shown {
    /// What hosts know it by, instead of the image's UUID.
    pub(super) uuid: Option<Uuid>,
    /// Reads may cross the borders of zones.
    pub(super) read_across_zones: bool,
}

/// The argument, taken apart. What it does not say is for all namespaces alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Argument {
    pub(super) image: OsString,
    pub(super) read_only: Option<bool>,
    pub(super) direct: Option<bool>,
    pub(super) run_state: Option<String>,
    pub(super) shown: Shown,
}

/// The keys that there are; those of an image first, which driver options have themselves.
const KEYS: [&str; 5] = ["read-only", "direct", "run-state", "uuid", "read-across-zones"];
const IMAGE_KEYS: &[&str] = KEYS.split_at(3).0;

impl Argument {
    /// Takes `IMAGE[,KEY=VALUE]...` apart, from the end on. `image_opts` says that the image is driver options.
    pub(super) fn parse(argument: &OsStr, image_opts: bool) -> Result<Argument, Usage> {
        let mut parsed = Argument::default();
        // A name that is not UTF-8 is a path as it is.
        let Some(mut rest) = argument.to_str() else {
            parsed.image = argument.to_owned();
            return Ok(parsed);
        };
        let is_json = !image_opts && (rest.starts_with("json:") || rest.starts_with('{'));
        let is_options = image_opts || rest.starts_with("driver=");
        // A comma inside of an object parts nothing.
        while !(is_json && rest.ends_with('}'))
            && let Some((image, option)) = rest.rsplit_once(',')
            && let Some((key, value)) = option.split_once('=')
        {
            let known = KEYS.contains(&key) && !(is_options && IMAGE_KEYS.contains(&key));
            if !known && (is_options || Path::new(rest).exists()) {
                break;
            }
            if !known {
                let near = did_you_mean(key, &KEYS);
                return Err(Usage(format!(
                    "{rest}: there is no such file, and {key:?} is no option of a namespace{near}; options are {}",
                    KEYS.join(", ")
                )));
            }
            parsed.set(key, value)?;
            rest = image;
        }
        parsed.image = rest.into();
        Ok(parsed)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), Usage> {
        let wrong = |expected: &str| Usage(format!("namespace option {key}={value}: it is {expected}"));
        let switch = || match value {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err(wrong("'on' or 'off'")),
        };
        match key {
            "read-only" => self.read_only = Some(switch()?),
            "direct" => self.direct = Some(switch()?),
            "run-state" => self.run_state = Some(value.to_owned()),
            "read-across-zones" => self.shown.read_across_zones = switch()?,
            _ => self.shown.uuid = Some(Uuid::parse_str(value).map_err(|_| wrong("a UUID"))?),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Argument {
        parse_as(text, false)
    }

    fn parse_as(text: &str, image_opts: bool) -> Argument {
        match Argument::parse(OsStr::new(text), image_opts) {
            Ok(argument) => argument,
            Err(Usage(why)) => panic!("{text}: {why}"),
        }
    }

    fn error(text: &str) -> String {
        match Argument::parse(OsStr::new(text), false) {
            Ok(argument) => panic!("{text}: {argument:?}"),
            Err(Usage(why)) => why,
        }
    }

    #[test]
    fn options_are_taken_off_the_end_of_a_path() {
        assert_eq!(parse("a.qcow2").image, "a.qcow2");
        let all = parse(
            "d/a.qcow2,read-only=on,direct=off,run-state=sync,read-across-zones=on,\
             uuid=6ba7b810-9dad-11d1-80b4-00c04fd430c8",
        );
        let expected = Argument {
            image: "d/a.qcow2".into(),
            read_only: Some(true),
            direct: Some(false),
            run_state: Some("sync".into()),
            shown: Shown {
                uuid: Some(Uuid::from_u128(0x6ba7b810_9dad_11d1_80b4_00c04fd430c8)),
                read_across_zones: true,
            },
        };
        assert_eq!(all, expected);
        assert_eq!(parse("a,b.raw,direct=on").image, "a,b.raw");
    }

    #[test]
    fn what_driver_options_can_say_is_left_to_them() {
        let graph = "driver=raw,file.driver=file,file.filename=a.raw,read-only=on";
        assert_eq!(parse(graph).image, graph);
        let argument = parse(&format!("{graph},read-across-zones=on"));
        assert_eq!((argument.image.to_str(), argument.read_only), (Some(graph), None));
        assert!(argument.shown.read_across_zones);
    }

    #[test]
    fn whatever_is_a_graph_elsewhere_is_one_here() {
        let opts = "file.driver=file,file.filename=a.raw,driver=raw";
        assert_eq!(parse_as(opts, true).image, opts);
        let argument = parse_as(&format!("{opts},read-across-zones=on"), true);
        assert_eq!(argument.image, opts);
        assert!(argument.shown.read_across_zones);
        for start in ["", "json:"] {
            let json = format!("{start}{}", r#"{"driver":"file","filename":"a,direct=on"}"#);
            assert_eq!(parse(&json).image, *json);
            let argument = parse(&format!("{json},read-only=on,read-across-zones=on"));
            assert_eq!(
                (argument.image.to_str(), argument.read_only),
                (Some(&*json), Some(true))
            );
            assert!(argument.shown.read_across_zones);
        }
        assert!(error(r#"{"driver":"memory"},sync=on"#).contains("no option of a namespace"));
    }

    #[test]
    fn options_that_are_none_are_named() {
        let why = error("none.raw,read-onl=on");
        assert!(
            why.contains("\"read-onl\" is no option") && why.contains("did you mean \"read-only\"?"),
            "{why}"
        );
        assert!(error("a,uuid=1").ends_with("it is a UUID"));
        assert!(error("a,direct=yes").ends_with("it is 'on' or 'off'"));
    }
}
