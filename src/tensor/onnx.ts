/**
 * A recorded program as an ONNX model (https://onnx.ai, opset 21, and the contributed operators of ONNX Runtime).
 * Weights are not copied into it: they stay in their file and are referred to by position.
 */

import { create, toBinary } from '@bufbuild/protobuf';
import { type DType, elementCount, type TensorData } from './data.ts';
import { type Dimension, dimensionText, type Shape, sameDimension } from './dimension.ts';
import { inOrder } from './gradient.ts';
import {
  type AttributeProto,
  AttributeProtoSchema,
  AttributeProto_AttributeType as AttributeType,
  GraphProtoSchema,
  ModelProtoSchema,
  type NodeProto,
  NodeProtoSchema,
  type TensorProto,
  TensorProto_DataLocation,
  TensorProtoSchema,
  type ValueInfoProto,
  ValueInfoProtoSchema,
} from './onnx_pb.ts';
import { type Attributes, isConstant, isInput, isParameter, type Tensor } from './tensor.ts';

/** ONNX's numbers for element types (TensorProto.DataType). */
const ELEMENT_TYPES: Record<DType, number> = {
  float32: 1,
  uint8: 2,
  int8: 3,
  int16: 5,
  int32: 6,
  int64: 7,
  bool: 9,
  float16: 10,
  float64: 11,
  bfloat16: 16,
  float8e4m3: 17,
  float8e5m2: 19,
};
const IR_VERSION = 10;
const OPSET = 21;

/** Where a weight's bytes lie: in a file, counted from its first byte. */
export interface FileLocation {
  /** Path relative to the folder the runtime is told, or the name the file's bytes are given under. */
  readonly file: string;
  readonly offset: number;
  readonly byteLength: number;
}

/** How a parameter gets its value: from a file, from memory, or anew at each run. */
export type Binding = FileLocation | TensorData | 'input';

export interface Program {
  /** Results by name. */
  readonly outputs: Readonly<Record<string, Tensor>>;
}

/** Put before the names of outputs, because a segment of a model gives what the next one takes under the same name. */
export const OUTPUT_PREFIX = 'output.';

/** What operations use to write themselves. */
export interface OnnxWriter {
  /** Adds a node and returns the name of its output. */
  node(type: string, inputs: readonly string[], attributes?: Attributes, domain?: string): string;
  /** An int64 constant [n]. */
  integers(values: readonly number[]): string;
  /** A float32 constant [n]. */
  floats(values: readonly number[]): string;
  /** A uint8 constant [n]. */
  bytes(values: readonly number[]): string;
  /** A dimension as an int64 tensor [1], computed from the inputs' sizes where symbolic. */
  dimension(dimension: Dimension): string;
  /** A shape as an int64 tensor. */
  shape(shape: Shape): string;
  /** The same for reshaping `from`: symbolic sizes are left to the runtime where it can infer them. */
  shapeFor(from: Tensor, to: Shape): string;
  elementType(dtype: DType): number;
  /** Whether attention is one node of ONNX Runtime's own. */
  readonly fusedAttention: boolean;
  /** Whether the program is for ONNX Runtime's CPU kernels, some of which take what others do not. */
  readonly cpu: boolean;
}

export interface OnnxOptions {
  /** Write attention as one node of ONNX Runtime's own (default true), else as products and a softmax. */
  fusedAttention?: boolean;
  /** Use what only ONNX Runtime's CPU kernels take (default true), else forms that every device takes. */
  cpu?: boolean;
}

export interface OnnxModel {
  /** The model in ONNX's file format. */
  readonly bytes: Uint8Array;
  /** Names of the nodes that read a few rows of a table and convert them: no reason to copy it to a graphics device. */
  readonly lookups: readonly string[];
}

function bytesOf(data: ArrayBufferView): Uint8Array {
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
}

function attributeProto(name: string, value: Attributes[string]): AttributeProto {
  if (typeof value === 'string') {
    return create(AttributeProtoSchema, { name, type: AttributeType.STRING, s: new TextEncoder().encode(value) });
  }
  if (typeof value === 'number') {
    return FLOAT_ATTRIBUTES.has(name)
      ? create(AttributeProtoSchema, { name, type: AttributeType.FLOAT, f: value })
      : create(AttributeProtoSchema, { name, type: AttributeType.INT, i: BigInt(value) });
  }
  return create(AttributeProtoSchema, {
    name,
    type: AttributeType.INTS,
    ints: (value as readonly number[]).map((entry) => BigInt(entry)),
  });
}
/** Attributes that are floats even when their value is whole. */
const FLOAT_ATTRIBUTES = new Set(['epsilon', 'scale']);

function valueInfo(name: string, dtype: DType, shape: Shape): ValueInfoProto {
  const dim = shape.map((dimension) => ({
    value:
      typeof dimension === 'number'
        ? ({ case: 'dimValue', value: BigInt(dimension) } as const)
        : ({ case: 'dimParam', value: dimensionText(dimension) } as const),
  }));
  return create(ValueInfoProtoSchema, {
    name,
    type: { value: { case: 'tensorType', value: { elemType: ELEMENT_TYPES[dtype], shape: { dim } } } },
  });
}

/** The names of a program's inputs and parameters and the parameters themselves, in the order first used. */
export function leaves(program: Program): { inputs: Tensor[]; parameters: Tensor[] } {
  const ordered = inOrder(Object.values(program.outputs));
  return { inputs: ordered.filter(isInput), parameters: ordered.filter(isParameter) };
}

/**
 * Writes a program as ONNX.
 *
 * @param bind says for each parameter where its value comes from
 * @throws RangeError when a symbolic size cannot be found from any input, or two inputs share a name
 */
export function writeOnnx(
  program: Program,
  bind: (parameter: Tensor) => Binding,
  { fusedAttention = true, cpu = true }: OnnxOptions = {},
): OnnxModel {
  const nodes: NodeProto[] = [];
  const initializers: TensorProto[] = [];
  const graphInputs: ValueInfoProto[] = [];
  const named = new Map<Tensor, string>();
  const written = new Map<string, string>();
  const ordered = inOrder(Object.values(program.outputs));

  // One name for each distinct node, so that equal subexpressions are computed once.
  const node: OnnxWriter['node'] = (type, inputs, attributes = {}, domain = '') => {
    const key = JSON.stringify([domain, type, inputs, attributes]);
    const known = written.get(key);
    if (known) return known;
    const name = `${type}_${nodes.length}`;
    nodes.push(
      create(NodeProtoSchema, {
        name,
        opType: type,
        domain,
        input: [...inputs],
        output: [name],
        attribute: Object.entries(attributes).map(([key, value]) => attributeProto(key, value)),
      }),
    );
    written.set(key, name);
    return name;
  };
  const initializer = (dtype: DType, shape: readonly number[], data: ArrayBufferView): string => {
    const raw = bytesOf(data);
    const key = raw.length <= 256 ? `${dtype} ${shape} ${raw.join()}` : '';
    const known = written.get(key);
    if (known) return known;
    const name = `constant_${initializers.length}`;
    initializers.push(
      create(TensorProtoSchema, { name, dataType: ELEMENT_TYPES[dtype], dims: shape.map(BigInt), rawData: raw }),
    );
    if (key) written.set(key, name);
    return name;
  };
  const integers: OnnxWriter['integers'] = (values) =>
    initializer('int64', [values.length], BigInt64Array.from(values, BigInt));
  const floats: OnnxWriter['floats'] = (values) => initializer('float32', [values.length], Float32Array.from(values));
  const bytes: OnnxWriter['bytes'] = (values) => initializer('uint8', [values.length], Uint8Array.from(values));

  const symbolValue = (name: string): string => {
    for (const tensor of ordered.filter(isInput)) {
      for (const [axis, dimension] of tensor.shape.entries()) {
        if (typeof dimension === 'number' || dimension.terms.size !== 1) continue;
        const factor = dimension.terms.get(name);
        if (factor === undefined) continue;
        const size = node('Gather', [node('Shape', [tensor.name!]), integers([axis])], { axis: 0 });
        return factor === 1 ? size : node('Div', [size, integers([factor])]);
      }
    }
    throw new RangeError(`No input tells the size of "${name}".`);
  };
  const dimension: OnnxWriter['dimension'] = (size) => {
    if (typeof size === 'number') return integers([size]);
    const terms = [...size.terms].map(([product, coefficient]) => {
      const factors = product
        .split('*')
        .filter((name) => name)
        .map(symbolValue);
      if (coefficient !== 1 || factors.length === 0) factors.push(integers([coefficient]));
      return factors.reduce((left, right) => node('Mul', [left, right]));
    });
    return terms.reduce((left, right) => node('Add', [left, right]));
  };
  const shape: OnnxWriter['shape'] = (sizes) => {
    if (sizes.every((size) => typeof size === 'number')) return integers(sizes);
    return sizes.length === 1 ? dimension(sizes[0]!) : node('Concat', sizes.map(dimension), { axis: 0 });
  };
  const shapeFor: OnnxWriter['shapeFor'] = (from, to) => {
    const symbolic = to.flatMap((size, axis) => (typeof size === 'number' ? [] : [axis]));
    // 0 copies the size of the same axis, -1 is whatever is left: the runtime's shape inference understands both.
    const copied = symbolic.filter(
      (axis) => from.shape[axis] !== undefined && sameDimension(from.shape[axis], to[axis]!),
    );
    const unknown = symbolic.filter((axis) => !copied.includes(axis));
    if (unknown.length > 1 || to.includes(0)) return shape(to);
    return integers(
      to.map((size, axis) => (copied.includes(axis) ? 0 : unknown.includes(axis) ? -1 : (size as number))),
    );
  };
  const writer: OnnxWriter = {
    node,
    integers,
    floats,
    bytes,
    dimension,
    shape,
    shapeFor,
    elementType: (dtype) => ELEMENT_TYPES[dtype],
    fusedAttention,
    cpu,
  };

  const parameterInitializer = (tensor: Tensor, name: string): void => {
    const binding = bind(tensor);
    if (binding === 'input') {
      graphInputs.push(valueInfo(name, tensor.dtype, tensor.shape));
      return;
    }
    const common = {
      name,
      dataType: ELEMENT_TYPES[tensor.dtype],
      dims: (tensor.shape as readonly number[]).map(BigInt),
    };
    if ('file' in binding) {
      const entries = { location: binding.file, offset: binding.offset, length: binding.byteLength };
      initializers.push(
        create(TensorProtoSchema, {
          ...common,
          dataLocation: TensorProto_DataLocation.EXTERNAL,
          externalData: Object.entries(entries).map(([key, value]) => ({ key, value: String(value) })),
        }),
      );
    } else {
      if (binding.dtype !== tensor.dtype || elementCount(binding.shape) !== elementCount(tensor.shape as number[])) {
        throw new RangeError(`The value of parameter "${name}" has another type or size than the program expects.`);
      }
      initializers.push(create(TensorProtoSchema, { ...common, rawData: bytesOf(binding.data) }));
    }
  };

  const nameOf = (tensor: Tensor): string => named.get(tensor)!;
  const taken = new Set<string>();
  const lookups: string[] = [];
  // Symbolic shapes of results. The runtime cannot follow them through reshapes, and without them it finds no two
  // buffers of equal size to reuse: loading then takes time that grows with the square of the number of nodes.
  const known = new Map<string, ValueInfoProto>();
  for (const tensor of ordered) {
    if (isInput(tensor) || isParameter(tensor)) {
      const name = tensor.name!;
      if (taken.has(name)) throw new RangeError(`Two inputs or parameters are named "${name}".`);
      taken.add(name);
      named.set(tensor, name);
      if (isInput(tensor)) graphInputs.push(valueInfo(name, tensor.dtype, tensor.shape));
      else parameterInitializer(tensor, name);
    } else if (isConstant(tensor)) {
      named.set(tensor, initializer(tensor.dtype, tensor.shape as number[], tensor.values!));
    } else {
      const { operation, inputs, attributes } = tensor;
      const names = inputs.map(nameOf);
      named.set(
        tensor,
        operation.write?.(tensor, names, writer) ?? node(operation.name, names, attributes, operation.domain),
      );
      if (tensor.shape.some((dimension) => typeof dimension !== 'number')) {
        known.set(nameOf(tensor), valueInfo(nameOf(tensor), tensor.dtype, tensor.shape));
      }
      const converts = operation.name === 'Cast' && inputs[0]!.operation.lookup;
      if (operation.lookup || converts) lookups.push(nameOf(tensor));
    }
  }

  const outputs = Object.entries(program.outputs).map(([name, tensor]) => {
    const output = `${OUTPUT_PREFIX}${name}`;
    nodes.push(
      create(NodeProtoSchema, { name: output, opType: 'Identity', input: [nameOf(tensor)], output: [output] }),
    );
    return valueInfo(output, tensor.dtype, tensor.shape);
  });
  const model = create(ModelProtoSchema, {
    irVersion: BigInt(IR_VERSION),
    producerName: 'mmditx',
    opsetImport: [
      { domain: '', version: BigInt(OPSET) },
      { domain: 'com.microsoft', version: 1n },
    ],
    graph: create(GraphProtoSchema, {
      name: 'program',
      node: nodes,
      initializer: initializers,
      input: graphInputs,
      output: outputs,
      valueInfo: [...known.values()],
    }),
  });
  return { bytes: toBinary(ModelProtoSchema, model), lookups };
}
