/**
 * Tensors kept in a folder under keys that say all they depend on: what was computed once from the same pictures,
 * texts and weights is found again, by any process that uses the folder.
 */

import { createHash } from 'node:crypto';
import { mkdir, readFile, rm, stat } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { MmditxError } from '../errors.ts';
import type { TensorData } from '../tensor/data.ts';
import { ioError } from '../weights/atomic.node.ts';
import { writeSafetensorsFile } from '../weights/files.node.ts';
import { openSafetensors, readTensor } from '../weights/safetensors.ts';

export interface EncodedCache {
  /** Where it lies. */
  readonly folder: string;
  /** Whether there is a file for the key; only reading it tells whether it is sound. */
  has(key: string): Promise<boolean>;
  /**
   * The tensors of a key; undefined where there are none or their file is damaged, which removes it.
   * @throws MmditxError `io` when the file cannot be read
   */
  read(key: string): Promise<ReadonlyMap<string, TensorData> | undefined>;
  /**
   * Keeps tensors. Another process finds all of them or none.
   * @throws MmditxError `io` when they cannot be written; nothing is left behind
   */
  write(key: string, tensors: ReadonlyMap<string, TensorData>): Promise<void>;
}

export type JsonValue =
  | string
  | number
  | boolean
  | null
  | readonly JsonValue[]
  | { readonly [name: string]: JsonValue | undefined };

/** A key: SHA-256 in hexadecimal digits. */
const KEY = /^[0-9a-f]{64}$/;
/** Digits of a key that name its folder: 256 of them keep folders short. */
const FOLDER_DIGITS = 2;
/** The digest of a file's tensors in its metadata. */
const DIGEST_KEY = 'digest';

/** A cache in a folder, which is made when something is first written. */
export function openEncodedCache(folder: string): EncodedCache {
  const pathOf = (key: string) => {
    requireKey(key);
    return join(folder, key.slice(0, FOLDER_DIGITS), `${key.slice(FOLDER_DIGITS)}.safetensors`);
  };
  return {
    folder,
    async has(key) {
      const status = await stat(pathOf(key)).catch(() => undefined);
      return status?.isFile() ?? false;
    },
    async read(key) {
      const path = pathOf(key);
      const bytes = await readFile(path).catch((cause: NodeJS.ErrnoException) => {
        if (cause.code === 'ENOENT') return undefined;
        throw ioError('read', path, cause);
      });
      if (!bytes) return undefined;
      const tensors = await parse(bytes, path);
      if (!tensors) await rm(path, { force: true }).catch(() => undefined);
      return tensors;
    },
    async write(key, tensors) {
      const path = pathOf(key);
      await mkdir(dirname(path), { recursive: true }).catch((cause: unknown) => {
        throw ioError('write', dirname(path), cause);
      });
      await writeSafetensorsFile(path, tensors, { [DIGEST_KEY]: digestOf(tensors) });
    },
  };
}

export function isKey(text: string): boolean {
  return KEY.test(text);
}

/** A key becomes a path: a text that is none could lead out of the folder. */
export function requireKey(key: string): void {
  if (!isKey(key)) throw new RangeError('A key of the cache is not a SHA-256 in hexadecimal digits.');
}

/**
 * SHA-256 of a value's JSON in hexadecimal digits. The order of members makes no difference, and members that are
 * undefined count as absent.
 * @throws RangeError for numbers that JSON cannot write
 */
export function cacheKey(value: JsonValue): string {
  return createHash('sha256').update(canonicalJson(value)).digest('hex');
}

function canonicalJson(value: JsonValue): string {
  if (typeof value === 'number' && !Number.isFinite(value)) throw new RangeError(`A key cannot depend on ${value}.`);
  if (typeof value !== 'object' || value === null) return JSON.stringify(value);
  if (isList(value)) return `[${value.map(canonicalJson).join()}]`;
  const members = Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1));
  const texts = members.flatMap(([name, member]) =>
    member === undefined ? [] : [`${JSON.stringify(name)}:${canonicalJson(member)}`],
  );
  return `{${texts.join()}}`;
}

/** `Array.isArray` does not tell lists that cannot be changed from objects. */
function isList(value: object): value is readonly JsonValue[] {
  return Array.isArray(value);
}

/** The tensors of a file, or undefined where it is not as it was written. */
async function parse(bytes: Uint8Array<ArrayBuffer>, path: string): Promise<Map<string, TensorData> | undefined> {
  try {
    const file = await openSafetensors({
      name: path,
      size: bytes.length,
      read: async (offset, length) => bytes.subarray(offset, offset + length),
    });
    const tensors = new Map<string, TensorData>();
    for (const name of file.tensors.keys()) tensors.set(name, await readTensor(file, name));
    return file.metadata[DIGEST_KEY] === digestOf(tensors) ? tensors : undefined;
  } catch (error) {
    if (error instanceof MmditxError) return undefined;
    throw error;
  }
}

/** SHA-256 over names, types, shapes and values. */
function digestOf(tensors: ReadonlyMap<string, TensorData>): string {
  const hash = createHash('sha256');
  for (const [name, { dtype, shape, data }] of [...tensors].sort(([a], [b]) => (a < b ? -1 : 1))) {
    hash.update(JSON.stringify([name, dtype, shape]));
    hash.update(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  }
  return hash.digest('hex');
}
