//! Pickles of tensors, read without running anything: what a class or a function would do is done here for the few that tensors are
//! made with, and any other is an error that names it.

use std::collections::HashMap;
use std::rc::Rc;

use crate::layer::DType;

/// What went wrong is a text, to which whoever opened the file adds its name.
pub type Result<T> = std::result::Result<T, String>;

/// Dimensions of a tensor, at most.
const MOST_DIMENSIONS: usize = 64;

/// A value. Collections are numbers of [`Values`]: however deep one holds another, dropping them is no recursion.
#[derive(Debug, Clone)]
pub enum Value {
    None,
    Int(i64),
    Text(Rc<str>),
    Bytes(Rc<[u8]>),
    /// A tuple, a list or a set.
    Many(usize),
    /// A dictionary: a key, its value, the next key and so on.
    Dict(usize),
    Class(Rc<str>),
    Storage(Rc<Storage>),
    Tensor(Rc<Tensor>),
    /// What does not matter here, such as a device, a truth value or a fraction.
    Other,
}

/// What collections hold, by their numbers.
#[derive(Debug, Default)]
pub struct Values(Vec<Vec<Value>>);

impl Values {
    fn add(&mut self, values: Vec<Value>) -> usize {
        self.0.push(values);
        self.0.len() - 1
    }

    /// Returns what a collection holds; nothing for other values.
    pub fn of(&self, value: &Value) -> &[Value] {
        match value {
            Value::Many(number) | Value::Dict(number) => &self.0[*number],
            _ => &[],
        }
    }
}

/// A run of numbers that tensors are views of.
#[derive(Debug, Clone, PartialEq)]
pub struct Storage {
    pub key: String,
    /// `None` for bytes whose type the tensor says.
    pub dtype: Option<DType>,
}

/// A view of a storage.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub storage: Rc<Storage>,
    pub dtype: DType,
    /// In elements.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<usize>,
}

/// Returns the element type of a class of storages.
fn storage_type(name: &str) -> Option<Option<DType>> {
    Some(match name {
        "torch.FloatStorage" => Some(DType::F32),
        "torch.HalfStorage" => Some(DType::F16),
        "torch.BFloat16Storage" => Some(DType::BF16),
        "torch.DoubleStorage" => Some(DType::F64),
        "torch.CharStorage" => Some(DType::I8),
        "torch.ByteStorage" => Some(DType::U8),
        "torch.ShortStorage" => Some(DType::I16),
        "torch.IntStorage" => Some(DType::I32),
        "torch.LongStorage" => Some(DType::I64),
        "torch.BoolStorage" => Some(DType::BOOL),
        "torch.Float8_e4m3fnStorage" => Some(DType::F8_E4M3),
        "torch.Float8_e5m2Storage" => Some(DType::F8_E5M2),
        "torch.storage.UntypedStorage" | "torch.UntypedStorage" => None,
        _ => return None,
    })
}

/// Returns the element type of that name.
fn dtype_named(name: &str) -> Option<DType> {
    Some(match name {
        "torch.float32" => DType::F32,
        "torch.float16" => DType::F16,
        "torch.bfloat16" => DType::BF16,
        "torch.float64" => DType::F64,
        "torch.int8" => DType::I8,
        "torch.uint8" => DType::U8,
        "torch.int16" => DType::I16,
        "torch.int32" => DType::I32,
        "torch.int64" => DType::I64,
        "torch.uint16" => DType::U16,
        "torch.uint32" => DType::U32,
        "torch.uint64" => DType::U64,
        "torch.bool" => DType::BOOL,
        "torch.float8_e4m3fn" => DType::F8_E4M3,
        "torch.float8_e5m2" => DType::F8_E5M2,
        _ => return None,
    })
}

/// Functions and classes that may be called.
const CALLS: [&str; 8] = [
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
];

fn is_known(class: &str) -> bool {
    CALLS.contains(&class) || storage_type(class).is_some() || dtype_named(class).is_some()
}

/// A pickle being read.
pub struct Pickle<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Values,
}

impl<'a> Pickle<'a> {
    /// Begins at a place of a file.
    pub fn at(bytes: &'a [u8], at: usize) -> Self {
        Pickle { bytes, at, values: Values::default() }
    }

    /// Returns what the collections that were read hold.
    pub fn values(&self) -> &Values {
        &self.values
    }

    /// Returns the place behind what was read.
    pub fn place(&self) -> usize {
        self.at
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let end =
            end.ok_or_else(|| format!("the pickle ends at byte {}, where {count} more are needed", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn number(&mut self, bytes: usize) -> Result<usize> {
        let taken = self.take(bytes)?;
        let value = taken.iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
        usize::try_from(value).map_err(|_| format!("a length of {value}"))
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at.min(self.bytes.len())..];
        let end = rest.iter().position(|&byte| byte == b'\n').ok_or("the pickle ends within a line")?;
        let line = self.take(end)?;
        self.at += 1;
        std::str::from_utf8(line).map_err(|_| "a line that is not UTF-8".into())
    }

    fn text(&mut self, length: usize) -> Result<Value> {
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map(|text| Value::Text(text.into())).map_err(|_| "a text that is not UTF-8".into())
    }

    /// Reads one value.
    ///
    /// # Errors
    /// When the bytes are no pickle, or make anything but tensors, numbers, texts and collections of them.
    pub fn read(&mut self) -> Result<Value> {
        let (mut stack, mut marks, mut memo) =
            (Vec::<Value>::new(), Vec::<usize>::new(), HashMap::<usize, Value>::new());
        fn pop(stack: &mut Vec<Value>, marks: &[usize]) -> Result<Value> {
            match stack.len() > marks.last().copied().unwrap_or(0) {
                true => Ok(stack.pop().expect("longer than nothing")),
                false => Err("a value is taken where there is none".into()),
            }
        }
        fn pop_mark(stack: &mut Vec<Value>, marks: &mut Vec<usize>) -> Result<Vec<Value>> {
            let mark = marks.pop().ok_or("a mark is taken where there is none")?;
            Ok(stack.split_off(mark))
        }
        fn top<'s>(stack: &'s [Value], marks: &[usize]) -> Result<&'s Value> {
            let value = stack.last().filter(|_| stack.len() > marks.last().copied().unwrap_or(0));
            value.ok_or_else(|| "a value is looked at where there is none".into())
        }
        loop {
            let opcode = self.take(1)?[0];
            let value = match opcode {
                b'.' => return pop(&mut stack, &marks),
                0x80 => {
                    let version = self.take(1)?[0];
                    if version > 5 {
                        return Err(format!("a pickle of protocol {version}, expected at most 5"));
                    }
                    continue;
                }
                0x95 => {
                    self.take(8)?;
                    continue;
                }
                b'(' => {
                    marks.push(stack.len());
                    continue;
                }
                b'0' => {
                    pop(&mut stack, &marks)?;
                    continue;
                }
                b'1' => {
                    pop_mark(&mut stack, &mut marks)?;
                    continue;
                }
                b'2' => top(&stack, &marks)?.clone(),
                b'N' => Value::None,
                0x88 | 0x89 => Value::Other,
                b'I' => match self.line()? {
                    "00" | "01" => Value::Other,
                    line => Value::Int(line.parse().map_err(|_| format!("'{line}' in place of a whole number"))?),
                },
                b'L' => {
                    let line = self.line()?.trim_end_matches('L');
                    Value::Int(line.parse().map_err(|_| format!("'{line}' in place of a whole number"))?)
                }
                b'F' => {
                    self.line()?;
                    Value::Other
                }
                b'J' => Value::Int(i32::from_le_bytes(self.take(4)?.try_into().expect("four bytes")).into()),
                b'K' => Value::Int(self.number(1)? as i64),
                b'M' => Value::Int(self.number(2)? as i64),
                0x8a | 0x8b => {
                    let length = self.number(if opcode == 0x8a { 1 } else { 4 })?;
                    let bytes = self.take(length)?;
                    // What is longer is no size of anything: the magic number of old files, which is held against its bytes.
                    if length > 8 {
                        Value::Bytes(bytes.into())
                    } else {
                        let unsigned = bytes.iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
                        let unused = 64 - 8 * length as u32;
                        Value::Int(if length == 0 { 0 } else { (unsigned << unused) as i64 >> unused })
                    }
                }
                b'G' => {
                    self.take(8)?;
                    Value::Other
                }
                b'X' => {
                    let length = self.number(4)?;
                    self.text(length)?
                }
                0x8c => {
                    let length = self.number(1)?;
                    self.text(length)?
                }
                0x8d => {
                    let length = self.number(8)?;
                    self.text(length)?
                }
                b'T' | b'U' => {
                    let length = self.number(if opcode == b'U' { 1 } else { 4 })?;
                    Value::Text(String::from_utf8_lossy(self.take(length)?).into())
                }
                b'V' => Value::Text(self.line()?.into()),
                b'B' | b'C' | 0x8e => {
                    let length = self.number(match opcode {
                        b'C' => 1,
                        b'B' => 4,
                        _ => 8,
                    })?;
                    Value::Bytes(self.take(length)?.into())
                }
                b')' | b']' | 0x8f => Value::Many(self.values.add(vec![])),
                b't' | b'l' | 0x91 => Value::Many(self.values.add(pop_mark(&mut stack, &mut marks)?)),
                0x85..=0x87 => {
                    let mut values = vec![];
                    for _ in 0..=opcode - 0x85 {
                        values.insert(0, pop(&mut stack, &marks)?);
                    }
                    Value::Many(self.values.add(values))
                }
                b'}' => Value::Dict(self.values.add(vec![])),
                b'd' => {
                    let dict = Value::Dict(self.values.add(vec![]));
                    self.set_items(&dict, pop_mark(&mut stack, &mut marks)?)?;
                    dict
                }
                b'a' => {
                    let value = pop(&mut stack, &marks)?;
                    self.append(top(&stack, &marks)?, vec![value])?;
                    continue;
                }
                b'e' | 0x90 => {
                    let values = pop_mark(&mut stack, &mut marks)?;
                    self.append(top(&stack, &marks)?, values)?;
                    continue;
                }
                b's' => {
                    let value = pop(&mut stack, &marks)?;
                    let key = pop(&mut stack, &marks)?;
                    self.set_items(top(&stack, &marks)?, vec![key, value])?;
                    continue;
                }
                b'u' => {
                    let values = pop_mark(&mut stack, &mut marks)?;
                    self.set_items(top(&stack, &marks)?, values)?;
                    continue;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    class(module, name)?
                }
                0x93 => match (pop(&mut stack, &marks)?, pop(&mut stack, &marks)?) {
                    (Value::Text(name), Value::Text(module)) => class(&module, &name)?,
                    _ => return Err("a class whose name is no text".into()),
                },
                b'R' | 0x81 => {
                    let arguments = pop(&mut stack, &marks)?;
                    let called = pop(&mut stack, &marks)?;
                    self.call(&called, &arguments)?
                }
                // State of an object: that of an OrderedDict (its `_metadata`) and of a tensor says nothing of numbers.
                b'b' => {
                    pop(&mut stack, &marks)?;
                    top(&stack, &marks)?;
                    continue;
                }
                b'Q' => self.persistent(&pop(&mut stack, &marks)?)?,
                b'q' | b'r' | b'p' | 0x94 => {
                    let number = match opcode {
                        b'q' => self.number(1)?,
                        b'r' => self.number(4)?,
                        b'p' => self.line()?.parse().map_err(|_| "a number of a memo that is none")?,
                        _ => memo.len(),
                    };
                    let value = top(&stack, &marks)?.clone();
                    memo.insert(number, value);
                    continue;
                }
                b'h' | b'j' | b'g' => {
                    let number = match opcode {
                        b'h' => self.number(1)?,
                        b'j' => self.number(4)?,
                        _ => self.line()?.parse().map_err(|_| "a number of a memo that is none")?,
                    };
                    memo.get(&number).cloned().ok_or_else(|| format!("memo {number} is read before it is written"))?
                }
                other => {
                    return Err(format!(
                        "opcode {other:#04x} of a pickle at byte {}, which is none for tensors",
                        self.at - 1
                    ));
                }
            };
            stack.push(value);
        }
    }
}

fn class(module: &str, name: &str) -> Result<Value> {
    let class = format!("{module}.{name}");
    match is_known(&class) {
        true => Ok(Value::Class(class.into())),
        false => Err(format!(
            "the pickle calls for '{class}', which is not among what tensors are made with: only tensors are read, and nothing is run. \
             Save the model's state_dict() instead"
        )),
    }
}

impl Pickle<'_> {
    fn append(&mut self, list: &Value, values: Vec<Value>) -> Result<()> {
        match list {
            Value::Many(number) => self.values.0[*number].extend(values),
            _ => return Err("values are appended to what is no list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, dict: &Value, items: Vec<Value>) -> Result<()> {
        match dict {
            Value::Dict(number) if items.len().is_multiple_of(2) => self.values.0[*number].extend(items),
            Value::Dict(_) => return Err("a key without a value".into()),
            _ => return Err("items are set in what is no dictionary".into()),
        }
        Ok(())
    }

    /// What a function or a class makes of its arguments.
    fn call(&mut self, called: &Value, arguments: &Value) -> Result<Value> {
        let (Value::Class(class), Value::Many(_)) = (called, arguments) else {
            return Err("something is called that is no function".into());
        };
        let wrong = || format!("arguments of '{class}' that it does not take");
        match (&**class, self.values.of(arguments)) {
            ("collections.OrderedDict", []) => Ok(Value::Dict(self.values.add(vec![]))),
            ("collections.OrderedDict", [pairs @ Value::Many(_)]) => {
                let pairs = self.values.of(pairs).iter().map(|pair| self.values.of(pair));
                let items: Vec<&[Value]> = pairs.collect();
                if items.iter().any(|pair| pair.len() != 2) {
                    return Err(wrong());
                }
                let items = items.concat();
                Ok(Value::Dict(self.values.add(items)))
            }
            ("torch.Size", [sizes]) => Ok(sizes.clone()),
            ("torch.device", _) => Ok(Value::Other),
            ("torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", [data, ..]) => {
                Ok(data.clone())
            }
            (
                "torch._utils._rebuild_tensor_v3",
                [Value::Storage(storage), offset, shape, strides, _, _, Value::Class(dtype), ..],
            ) => {
                let dtype = dtype_named(dtype).ok_or_else(wrong)?;
                self.tensor(storage, dtype, (offset, shape, strides)).ok_or_else(wrong)
            }
            (
                "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor",
                [Value::Storage(storage), offset, shape, strides, ..],
            ) => {
                let dtype = storage.dtype.ok_or_else(wrong)?;
                self.tensor(storage, dtype, (offset, shape, strides)).ok_or_else(wrong)
            }
            _ => Err(wrong()),
        }
    }

    fn tensor(
        &self,
        storage: &Rc<Storage>,
        dtype: DType,
        (offset, shape, strides): (&Value, &Value, &Value),
    ) -> Option<Value> {
        let size = |value: &Value| match value {
            Value::Int(size) => usize::try_from(*size).ok(),
            _ => None,
        };
        let sizes = |value: &Value| self.values.of(value).iter().map(size).collect::<Option<Vec<_>>>();
        let (offset, shape, strides) = (size(offset)?, sizes(shape)?, sizes(strides)?);
        (shape.len() == strides.len() && shape.len() <= MOST_DIMENSIONS)
            .then(|| Value::Tensor(Rc::new(Tensor { storage: storage.clone(), dtype, offset, shape, strides })))
    }

    /// The storage that an identifier stands for: `('storage', class, key, place, length)`, in old files with a view behind.
    fn persistent(&self, id: &Value) -> Result<Value> {
        match self.values.of(id) {
            [Value::Text(kind), Value::Class(class), Value::Text(key), _, _, rest @ ..] if &**kind == "storage" => {
                let dtype = storage_type(class).ok_or_else(|| format!("a storage of '{class}'"))?;
                if rest.iter().any(|view| !matches!(view, Value::None)) {
                    return Err("a storage that is a view of another, as very old files have".into());
                }
                Ok(Value::Storage(Rc::new(Storage { key: key.to_string(), dtype })))
            }
            _ => Err("an identifier that is none of a storage".into()),
        }
    }
}
