/** Where the hub is, who asks and where files are kept: options first, then the variables that Hugging Face's tools read. */
import { readFile, stat } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join, resolve } from 'node:path';
import { MmditxError } from '../errors.ts';
import { ioError } from './atomic.node.ts';
import { quote } from './quote.ts';

export interface HubOptions {
  /** Address of the hub (default `HF_ENDPOINT`, else https://huggingface.co). */
  readonly endpoint?: string;
  /** Access token (default `HF_TOKEN`, else what `hf auth login` has stored). */
  readonly token?: string;
  /** Folder of the cache that all Hugging Face tools share (default `HF_HUB_CACHE`, `HF_HOME`/hub, ~/.cache/huggingface/hub). */
  readonly cache?: string;
  /** Take what the cache has and ask nobody (default `HF_HUB_OFFLINE`). */
  readonly offline?: boolean;
}

export interface HubSettings {
  /** Without a slash at its end. */
  readonly endpoint: string;
  readonly token: string | undefined;
  readonly cache: string;
  readonly offline: boolean;
}

export type Environment = Readonly<Record<string, string | undefined>>;

const PUBLIC_HUB = 'https://huggingface.co';
/** Tokens have about 40 characters; no file beyond this is read in search of one. */
const MAX_TOKEN_FILE_BYTES = 4096;

/** @throws MmditxError `bad-option` for an endpoint or a token that cannot be one, `io` when the token's file cannot be read */
export async function hubSettings(options: HubOptions, environment: Environment): Promise<HubSettings> {
  const variable = (name: string) => environment[name] || undefined;
  const home = variable('HF_HOME') ?? join(variable('XDG_CACHE_HOME') ?? join(homedir(), '.cache'), 'huggingface');
  const cache = options.cache ?? variable('HF_HUB_CACHE') ?? variable('HUGGINGFACE_HUB_CACHE') ?? join(home, 'hub');
  return {
    endpoint: parseEndpoint(options.endpoint ?? variable('HF_ENDPOINT') ?? PUBLIC_HUB),
    token: checkToken(
      options.token ??
        variable('HF_TOKEN') ??
        variable('HUGGING_FACE_HUB_TOKEN') ??
        (await storedToken(variable('HF_TOKEN_PATH') ?? join(home, 'token'))),
    ),
    cache: resolve(withHome(cache)),
    offline: options.offline ?? /^(1|on|yes|true)$/i.test(variable('HF_HUB_OFFLINE') ?? ''),
  };
}

function parseEndpoint(text: string): string {
  const url = URL.canParse(text) ? new URL(text) : undefined;
  if (!url || !/^https?:$/.test(url.protocol) || url.username || url.password || url.search || url.hash) {
    throw new MmditxError(
      'bad-option',
      `The endpoint ${quote(withoutCredentials(text))} is no address of a hub; give one such as ${PUBLIC_HUB}.`,
    );
  }
  return url.href.replace(/\/+$/, '');
}

/** A password in an address must not appear in a message. */
function withoutCredentials(text: string): string {
  return text.replace(/\/\/[^/]*@/, '//');
}

function checkToken(token: string | undefined): string | undefined {
  const trimmed = token?.trim();
  // Other characters cannot stand in a header. The message must not show the token.
  if (trimmed && !/^[!-~]+$/.test(trimmed)) {
    throw new MmditxError(
      'bad-option',
      `The access token has characters no token has; copy it again from ${tokenPage()}.`,
    );
  }
  return trimmed || undefined;
}

/** Where people make tokens. */
export function tokenPage(endpoint = PUBLIC_HUB): string {
  return `${endpoint}/settings/tokens`;
}

async function storedToken(path: string): Promise<string | undefined> {
  const file = withHome(path);
  const status = await stat(file).catch(() => undefined);
  if (!status?.isFile() || status.size > MAX_TOKEN_FILE_BYTES) return undefined;
  return await readFile(file, 'utf8').catch((cause) => {
    throw ioError('read', file, cause);
  });
}

/** Shells leave `~` in variables as it is. */
function withHome(path: string): string {
  return path.replace(/^~(?=$|[/\\])/, () => homedir());
}
