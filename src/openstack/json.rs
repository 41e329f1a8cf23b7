//! Reading JSON answers: a field that is missing or of another type becomes an error that names it.

use serde_json::{Map, Value};

use super::error::{Error, Result};

/// The fields of a JSON object in the answer to `call`.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    call: &'a str,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(call: &'a str, value: &'a Value) -> Result<Self> {
        match value.as_object() {
            Some(object) => Ok(Self { call, object }),
            None => Err(Error::protocol(call, format!("expected an object, found {}", kind(value)))),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.object.iter()
    }

    /// The object under `name`.
    pub(super) fn object(&self, name: &str) -> Result<Fields<'a>> {
        let value = self.required(name)?;
        match value.as_object() {
            Some(object) => Ok(Self { call: self.call, object }),
            None => Err(self.wrong(name, "an object", value)),
        }
    }

    pub(super) fn array(&self, name: &str) -> Result<&'a [Value]> {
        let value = self.required(name)?;
        value.as_array().map(Vec::as_slice).ok_or_else(|| self.wrong(name, "an array", value))
    }

    pub(super) fn text(&self, name: &str) -> Result<String> {
        let value = self.required(name)?;
        value.as_str().map(str::to_owned).ok_or_else(|| self.wrong(name, "a string", value))
    }

    /// `None` for null or a missing field.
    pub(super) fn text_or_none(&self, name: &str) -> Result<Option<String>> {
        match self.optional(name) {
            None => Ok(None),
            Some(value) => {
                value.as_str().map(|text| Some(text.to_owned())).ok_or_else(|| self.wrong(name, "a string", value))
            }
        }
    }

    pub(super) fn number(&self, name: &str) -> Result<u64> {
        let value = self.required(name)?;
        value.as_u64().ok_or_else(|| self.wrong(name, "a whole number", value))
    }

    /// `None` for null or a missing field.
    pub(super) fn number_or_none(&self, name: &str) -> Result<Option<u64>> {
        match self.optional(name) {
            None => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or_else(|| self.wrong(name, "a whole number", value)),
        }
    }

    pub(super) fn integer(&self, name: &str) -> Result<i64> {
        let value = self.required(name)?;
        value.as_i64().ok_or_else(|| self.wrong(name, "a whole number", value))
    }

    /// `false` for null or a missing field; services write `true` and `"true"`.
    pub(super) fn flag(&self, name: &str) -> Result<bool> {
        match self.optional(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
            Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
            Some(value) => Err(self.wrong(name, "true or false", value)),
        }
    }

    /// The field, unless it is missing or null.
    pub(super) fn optional(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    fn required(&self, name: &str) -> Result<&'a Value> {
        self.object.get(name).ok_or_else(|| Error::protocol(self.call, format!("the answer has no field {name:?}")))
    }

    pub(super) fn wrong(&self, name: &str, expected: &str, value: &Value) -> Error {
        Error::protocol(self.call, format!("field {name:?}: expected {expected}, found {}", kind(value)))
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
pub(super) mod hostile {
    //! JSON that no service would send.

    use proptest::prelude::*;
    use serde_json::Value;

    /// Any JSON; its objects use `names`, so that fields of the wrong type are met.
    pub(crate) fn value(names: &'static [&'static str]) -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,20}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 40, 10, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                proptest::collection::hash_map(
                    prop_oneof![3 => proptest::sample::select(names).prop_map(str::to_owned), 1 => ".{0,8}"],
                    inner,
                    0..10
                )
                .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }
}
