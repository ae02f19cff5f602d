//! A tree of options, written dotted (`file.filename=x`) or as JSON.

use serde_json::{Map, Value};

use super::qcow2::is_nothing;
use super::size::parse_size;
use crate::error::OpenError;

/// Deepest nesting of a described graph.
const MAX_DEPTH: usize = 16;

/// The options of one node; reading one takes it, so that what is left over is unknown.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where this node stands in the whole, as `file.file.`; for messages.
    prefix: String,
    map: Map<String, Value>,
}

impl Options {
    pub fn parse(text: &str) -> Result<Options, OpenError> {
        let mut map = Map::new();
        for item in split_commas(text) {
            let (key, value) = item.split_once('=').ok_or_else(|| {
                OpenError::Graph(format!("option {item:?} has no value; write {item}=VALUE"))
            })?;
            insert(&mut map, key, value)?;
        }
        Ok(Options {
            prefix: String::new(),
            map,
        })
    }

    pub fn parse_json(text: &str) -> Result<Options, OpenError> {
        let value: Value = serde_json::from_str(text).map_err(|error| {
            OpenError::Graph(format!("the JSON description of the graph is wrong: {error}"))
        })?;
        let Value::Object(object) = value else {
            return Err(OpenError::Graph(
                "the JSON description of a graph is an object, as {\"driver\": ...}".into(),
            ));
        };
        // Dotted keys are allowed in JSON as well.
        let mut map = Map::new();
        for (key, value) in object {
            insert_value(&mut map, &key, value, 0)?;
        }
        Ok(Options {
            prefix: String::new(),
            map,
        })
    }

    /// Where this node stands in the description.
    pub fn place(&self) -> &str {
        &self.prefix
    }

    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The string at a key, without taking it.
    pub fn peek(&self, key: &str) -> Option<&str> {
        self.map.get(key)?.as_str()
    }

    /// Takes the value of a possibly dotted key.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        match key.split_once('.') {
            None => self.map.remove(key),
            Some((first, rest)) => self.map.get_mut(first)?.as_object_mut()?.remove(rest),
        }
    }

    pub fn string(&mut self, key: &str) -> Result<Option<String>, OpenError> {
        match self.take(key) {
            None => Ok(None),
            Some(value) => scalar(&value)
                .map(Some)
                .ok_or_else(|| self.wrong(key, &value, "a single value")),
        }
    }

    pub fn required(&mut self, key: &str) -> Result<String, OpenError> {
        match self.string(key)? {
            Some(value) => Ok(value),
            None => Err(OpenError::Graph(format!(
                "{}{key} is missing{}",
                self.prefix,
                self.instead(key)
            ))),
        }
    }

    /// What looks like that key written wrongly.
    fn instead(&self, key: &str) -> String {
        let near = |given: &&String| !did_you_mean(given, &[key]).is_empty();
        match self.map.keys().find(near) {
            Some(given) => format!(
                "; {}{given} is not an option (did you mean {key:?}?)",
                self.prefix
            ),
            None => String::new(),
        }
    }

    pub fn bool(&mut self, key: &str) -> Result<Option<bool>, OpenError> {
        match self.string(key)?.as_deref() {
            None => Ok(None),
            Some("on" | "true" | "yes") => Ok(Some(true)),
            Some("off" | "false" | "no") => Ok(Some(false)),
            Some(other) => Err(self.wrong(key, &Value::from(other), "on or off")),
        }
    }

    pub fn size(&mut self, key: &str) -> Result<Option<u64>, OpenError> {
        let Some(text) = self.string(key)? else {
            return Ok(None);
        };
        parse_size(&text)
            .map(Some)
            .ok_or_else(|| self.wrong(key, &Value::from(text), "a size, as in 64M"))
    }

    pub fn number(&mut self, key: &str) -> Result<Option<u32>, OpenError> {
        let Some(text) = self.string(key)? else {
            return Ok(None);
        };
        let number = parse_size(&text).and_then(|number| u32::try_from(number).ok());
        number
            .map(Some)
            .ok_or_else(|| self.wrong(key, &Value::from(text), "a number below 2^32"))
    }

    /// Takes the options of a child.
    pub fn child(&mut self, key: &str) -> Result<Options, OpenError> {
        let prefix = format!("{}{key}.", self.prefix);
        match self.map.remove(key) {
            Some(Value::Object(map)) => Ok(Options { prefix, map }),
            Some(value) => Err(self.wrong(key, &value, "a node, as in file.driver=...")),
            None => Err(OpenError::Graph(format!("{prefix}driver is missing"))),
        }
    }

    /// Takes the options of a child that may also be named as nothing: `None` where it is not mentioned.
    pub fn node(&mut self, key: &str) -> Result<Option<Option<Options>>, OpenError> {
        match self.map.get(key) {
            None => Ok(None),
            Some(value) if is_nothing(value) => {
                self.map.remove(key);
                Ok(Some(None))
            }
            Some(_) => self.child(key).map(|tree| Some(Some(tree))),
        }
    }

    /// Sets what the user left out.
    pub fn set(&mut self, key: &str, value: &str) {
        self.map.insert(key.to_owned(), Value::from(value));
    }

    /// The first value of that key here or in the chain of `file` children, without taking it.
    pub fn find_string(&self, key: &str) -> Option<String> {
        let mut map = &self.map;
        for _ in 0..MAX_DEPTH {
            let here = match key.split_once('.') {
                None => map.get(key),
                Some((first, rest)) => map.get(first).and_then(|value| value.get(rest)),
            };
            if let Some(value) = here {
                return scalar(value);
            }
            map = map.get("file")?.as_object()?;
        }
        None
    }

    /// Complains about what was not taken.
    pub fn finish(&self, driver: &str, known: &[&str]) -> Result<(), OpenError> {
        let Some(key) = first_leaf(&self.map, String::new()) else {
            return Ok(());
        };
        let others: Vec<_> = known.iter().filter(|name| **name != "driver").copied().collect();
        Err(OpenError::Graph(format!(
            "driver {driver} has no option {:?}{}; its options are {}",
            format!("{}{key}", self.prefix),
            did_you_mean(&key, known),
            others.join(", ")
        )))
    }

    fn wrong(&self, key: &str, value: &Value, wanted: &str) -> OpenError {
        let value = scalar(value).unwrap_or_else(|| value.to_string());
        OpenError::Graph(format!("{}{key}={value} is not {wanted}", self.prefix))
    }
}

fn split_commas(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        if char == ',' && chars.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else {
            items.last_mut().expect("never empty").push(char);
        }
    }
    items.retain(|item| !item.is_empty());
    items
}

fn insert(map: &mut Map<String, Value>, key: &str, value: &str) -> Result<(), OpenError> {
    insert_value(map, key, Value::from(value), 0)
}

fn insert_value(
    map: &mut Map<String, Value>,
    key: &str,
    value: Value,
    depth: usize,
) -> Result<(), OpenError> {
    if depth > MAX_DEPTH {
        return Err(OpenError::Graph(format!(
            "the graph is nested more than {MAX_DEPTH} levels deep"
        )));
    }
    let twice = || OpenError::Graph(format!("option {key:?} is given twice"));
    if let Some((first, rest)) = key.split_once('.') {
        let inner = map.entry(first).or_insert_with(|| Value::Object(Map::new()));
        return insert_value(inner.as_object_mut().ok_or_else(twice)?, rest, value, depth + 1);
    }
    match value {
        Value::Object(object) => {
            let inner = map.entry(key).or_insert_with(|| Value::Object(Map::new()));
            let inner = inner.as_object_mut().ok_or_else(twice)?;
            object
                .into_iter()
                .try_for_each(|(key, value)| insert_value(inner, &key, value, depth + 1))
        }
        value => match map.insert(key.to_owned(), value) {
            None => Ok(()),
            Some(_) => Err(twice()),
        },
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(true) => Some("on".into()),
        Value::Bool(false) => Some("off".into()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn first_leaf(map: &Map<String, Value>, prefix: String) -> Option<String> {
    map.iter().find_map(|(key, value)| match value {
        Value::Object(inner) => first_leaf(inner, format!("{prefix}{key}.")),
        _ => Some(format!("{prefix}{key}")),
    })
}

/// `" (did you mean ...?)"` where a known name is near.
pub fn did_you_mean(given: &str, known: &[&str]) -> String {
    let near = known.iter().map(|name| (distance(given, name), name)).min();
    match near {
        Some((distance, name)) if distance <= 2.max(given.len() / 3) => format!(" (did you mean {name:?}?)"),
        _ => String::new(),
    }
}

/// Edit distance (insertions, deletions, replacements) of two short words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dotted_options_and_json_describe_the_same_tree() {
        let dotted =
            Options::parse("driver=raw,file.driver=file,file.filename=a,,b,file.cache.direct=on").unwrap();
        let json = Options::parse_json(
            r#"{"driver": "raw", "file": {"driver": "file", "filename": "a,b", "cache": {"direct": "on"}}}"#,
        );
        assert_eq!(dotted.map, json.unwrap().map);
    }

    #[test]
    fn wrong_descriptions_are_errors() {
        for text in [
            "driver",
            "driver=raw,driver=file",
            "file=x,file.driver=y",
            &format!("{}x=1", "a.".repeat(100)),
        ] {
            assert!(Options::parse(text).is_err(), "{text}");
        }
        assert!(Options::parse_json("[]").is_err());
        let deep = format!("{}1{}", "{\"a\":".repeat(100), "}".repeat(100));
        assert!(Options::parse_json(&deep).is_err());
    }

    #[test]
    fn near_names_are_suggested() {
        assert_eq!(
            did_you_mean("flie", &["file", "memory"]),
            " (did you mean \"file\"?)"
        );
        assert_eq!(did_you_mean("nbd", &["zoned", "memory"]), "");
    }
}
