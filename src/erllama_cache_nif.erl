%% The stubs of the NIF library, one to one, and what each call gives. Private: use
%% erllama_cache_writer and erllama_cache_store.
%%
%% A root is a file system path as the system wants it: encoded, without a NUL.
%% Functions that end in `_more' continue what another has begun, for as long as the answer is
%% `more'. A slice takes 10 ms, or as long as a sync, whichever is longer.
%%
%% @private
-module(erllama_cache_nif).

-export([
    semaphore_new/0, semaphore_new/1, semaphore_open/3, semaphore_close/1, semaphore_abandon/1,
    semaphore_set_limit/2, semaphore_set_max_bytes/2,
    semaphore_current/1, semaphore_limit/1,
    semaphore_info/1, semaphore_holders/1, semaphore_waiters/1,
    guard_new/1, try_acquire/1, try_acquire/3,
    acquire_or_queue/4, acquire_or_queue_last/4, give_up/1, release/1,
    handle_new/1, handle_pid/1,
    quant_byte/1, encode_tokens/1, key/4, key_of_many/4, prefix_keys/5, prefix_keys_of_many/5,
    write_tmp/5, write_more/4, write_and_publish/5, write_and_publish_in_memory/4,
    publish/3, abort/1, secret_new/1, sync_failures/0, live_objects/0,
    import_begin/5, import_write/3, import_source/2, import_receive/2, import_publish/2,
    import_abort/1,
    load/4, load_more/2, describe/4, load_abort/1, note_use/4, check/4, check_more/2,
    remove_corrupt/4, remove_corrupt_more/2,
    takes_unnamed/2, root_generation/1, exists/3, free_bytes/2, delete/3, scan/4, scan_more/2
]).
-export_type([
    semaphore/0, guard/0, tmp/0, root/0, key/0, key_length/0, secret/0, save_plan/0, save_options/0,
    effort/0, failure/0, found/0
]).

-on_load(load_library/0).

-type semaphore() :: reference().
-type guard() :: reference().
-type turn() :: guard().
%% The guard of a turn, which every call that does I/O takes: see erllama_cache_io_limit.
-type tmp() :: reference().
-type root() :: binary().
-type key() :: <<_:256>>.
-type key_length() :: {erllama_cache_host:keyed_by(), non_neg_integer()}.
%% What a key is made of, and of how much of it: so many tokens, or bytes of text.
-type bytes_bound() :: non_neg_integer() | infinity.
-type row() :: {pid(), Weight :: pos_integer(), Bytes :: non_neg_integer(),
                Milliseconds :: non_neg_integer()}.
-type secret() :: reference().
-type save_plan() :: {
    key(), erllama_cache_host:keyed_by(), erllama_cache_meta:complete(), QuantByte :: byte(),
    Tokens :: binary(), save_options()
}.
%% What makes a file, but for its root and its payload. What its key is made of decides the file's
%% version: 1 for tokens, 2 for text. The metadata is complete, as erllama_cache_meta:complete/3
%% returns it.
-type save_options() ::
    {Mode :: non_neg_integer(), none | blake3 | secret(), keep | drop, effort()}.
%% The file's permissions; its digest, keyed if there is a secret; whether it stays in the page
%% cache; how much of the machine it takes to write it.
-type effort() :: helped | 1..100.
%% Another thread helps; or none does, and the one that writes takes this percentage of its
%% processor.
-type published() ::
    {ok, linked | adopted | replaced, Size :: pos_integer(), Header :: <<_:384>>}.
-type failure() :: {error, file:posix() | {errno, integer()} | {corrupt | read_back, atom()}
                           | {invalid_meta, atom()} | enomem | atom()}.
-type found() :: {file, key(), key_length(), Size :: pos_integer(), LastUsed :: non_neg_integer(),
                  Hits :: non_neg_integer()}
               | {removed, key(), Reason :: atom()}
               | swept
               | rejected
               | {skipped, key() | undefined, Size :: non_neg_integer(),
                  Modified :: non_neg_integer(), Reason :: term()}.

-define(NOT_LOADED, erlang:nif_error(nif_not_loaded)).

%% The library lies in priv of this application, or beside ebin where the application's name is
%% not known, as with `erl -pa'.
load_library() ->
    Priv =
        case code:priv_dir(erllama_cache_nif) of
            {error, bad_name} ->
                filename:join(filename:dirname(filename:dirname(code:which(?MODULE))), "priv");
            Dir ->
                Dir
        end,
    erlang:load_nif(filename:join(Priv, "erllama_cache_nif"), 0).

%% A semaphore without a server: open from the start, and for as long as it is there.
-spec semaphore_new(pos_integer()) -> semaphore().
semaphore_new(_Limit) -> ?NOT_LOADED.

%% A semaphore that is closed until it is opened.
-spec semaphore_new() -> semaphore().
semaphore_new() -> ?NOT_LOADED.

%% Opens it on behalf of the calling server: when that process dies without having closed it, new
%% acquires find it closed, while waiters keep waiting.
-spec semaphore_open(semaphore(), Limit :: pos_integer(), bytes_bound()) -> ok.
semaphore_open(_Semaphore, _Limit, _MaxBytes) -> ?NOT_LOADED.

%% Refuses all waiters and new acquires.
-spec semaphore_close(semaphore()) -> ok.
semaphore_close(_Semaphore) -> ?NOT_LOADED.

%% Refuses all waiters, if its server has died and no other has opened it since.
-spec semaphore_abandon(semaphore()) -> ok.
semaphore_abandon(_Semaphore) -> ?NOT_LOADED.

-spec semaphore_set_limit(semaphore(), pos_integer()) -> ok.
semaphore_set_limit(_Semaphore, _Limit) -> ?NOT_LOADED.

-spec semaphore_set_max_bytes(semaphore(), bytes_bound()) -> ok.
semaphore_set_max_bytes(_Semaphore, _MaxBytes) -> ?NOT_LOADED.

-spec semaphore_current(semaphore()) -> non_neg_integer().
semaphore_current(_Semaphore) -> ?NOT_LOADED.

-spec semaphore_limit(semaphore()) -> pos_integer().
semaphore_limit(_Semaphore) -> ?NOT_LOADED.

-spec semaphore_info(semaphore()) -> #{atom() => term()}.
semaphore_info(_Semaphore) -> ?NOT_LOADED.

-spec semaphore_holders(semaphore()) -> [row()].
semaphore_holders(_Semaphore) -> ?NOT_LOADED.

-spec semaphore_waiters(semaphore()) -> [row()].
semaphore_waiters(_Semaphore) -> ?NOT_LOADED.

%% The calling process's guard: one for each process, kept for as long as it lives.
-spec guard_new(semaphore()) -> guard().
guard_new(_Semaphore) -> ?NOT_LOADED.

%% One slot, no bytes.
-spec try_acquire(guard()) -> ok | busy | closed | ended.
try_acquire(_Guard) -> ?NOT_LOADED.

-spec try_acquire(guard(), Weight :: pos_integer(), Bytes :: non_neg_integer()) ->
    ok | busy | closed | weight_exceeds_limit | ended.
try_acquire(_Guard, _Weight, _Bytes) -> ?NOT_LOADED.

%% `queued' means that exactly one message `{Ref, granted | closed | weight_exceeds_limit}' will
%% come, unless `give_up' answers `withdrawn' first.
-spec acquire_or_queue(guard(), pos_integer(), non_neg_integer(), reference()) ->
    ok | queued | closed | weight_exceeds_limit | ended.
acquire_or_queue(_Guard, _Weight, _Bytes, _Ref) -> ?NOT_LOADED.

%% The same in the last lane, which is served when no process waits in the usual one.
-spec acquire_or_queue_last(guard(), pos_integer(), non_neg_integer(), reference()) ->
    ok | queued | closed | weight_exceeds_limit | ended.
acquire_or_queue_last(_Guard, _Weight, _Bytes, _Ref) -> ?NOT_LOADED.

%% `decided': the message has been sent or is being sent.
-spec give_up(guard()) -> withdrawn | decided.
give_up(_Guard) -> ?NOT_LOADED.

%% Gives back what was acquired last; `none' when nothing is held.
-spec release(guard()) -> ok | none.
release(_Guard) -> ?NOT_LOADED.

%% A reference that knows a process of this node.
-spec handle_new(pid()) -> reference().
handle_new(_Pid) -> ?NOT_LOADED.

%% That process; `none' for any other reference.
-spec handle_pid(reference()) -> pid() | none.
handle_pid(_Ref) -> ?NOT_LOADED.

-spec quant_byte(atom()) -> byte().
quant_byte(_QuantType) -> ?NOT_LOADED.

%% u32 little-endian each, modulo 2^32; `error' for what does not fit 64 bits or is no integer, and
%% for a list that is improper or longer than a call should take.
-spec encode_tokens(Tokens :: term()) -> binary() | error.
encode_tokens(_Tokens) -> ?NOT_LOADED.

%% SHA-256 over the four, in this order.
-spec key(<<_:256>>, byte(), <<_:256>>, binary()) -> key().
key(_Fingerprint, _QuantByte, _CtxParamsHash, _Tokens) -> ?NOT_LOADED.

%% The same on a dirty scheduler, for many tokens.
-spec key_of_many(<<_:256>>, byte(), <<_:256>>, binary()) -> key().
key_of_many(_Fingerprint, _QuantByte, _CtxParamsHash, _Tokens) -> ?NOT_LOADED.

%% The keys of the prefixes of `Keyed' that end at these bytes, one after another. The ends ascend
%% and lie within `Keyed', or it is a `badarg'.
-spec prefix_keys(<<_:256>>, byte(), <<_:256>>, Keyed :: binary(), Ends :: [non_neg_integer()]) ->
    <<_:_*256>>.
prefix_keys(_Fingerprint, _QuantByte, _CtxParamsHash, _Keyed, _Ends) -> ?NOT_LOADED.

%% The same on a dirty scheduler, for many bytes or many ends.
-spec prefix_keys_of_many(<<_:256>>, byte(), <<_:256>>, binary(), [non_neg_integer()]) ->
    <<_:_*256>>.
prefix_keys_of_many(_Fingerprint, _QuantByte, _CtxParamsHash, _Keyed, _Ends) -> ?NOT_LOADED.

%% How many syncs of files and directories have failed since the library was loaded.
-spec sync_failures() -> non_neg_integer().
sync_failures() -> ?NOT_LOADED.

%% How many resource objects of each type are alive: for tests that look for leaks.
-spec live_objects() ->
    #{semaphore | guard | secret | courier | handle | tmp | load | check | scan =>
        non_neg_integer()}.
live_objects() -> ?NOT_LOADED.

%% Keeps a secret where nothing prints it.
-spec secret_new(<<_:256>>) -> secret().
secret_new(_Bytes) -> ?NOT_LOADED.

%% Creates a temporary file in the root and begins to write.
-spec write_tmp(turn(), guard(), root(), save_plan(), Payload :: binary()) ->
    {ok | more, tmp()} | failure().
write_tmp(_Turn, _Guard, _Root, _Plan, _Payload) -> ?NOT_LOADED.

%% write_tmp/5 and publish/3 in one call, for a payload of some ten KiB: after `more' go on as after
%% the first, after `{ok, Tmp}' go on with the second.
-spec write_and_publish(turn(), guard(), root(), save_plan(), Payload :: binary()) ->
    published() | {ok | more, tmp()} | failure().
write_and_publish(_Turn, _Guard, _Root, _Plan, _Payload) -> ?NOT_LOADED.

%% The same on the caller's own scheduler, in a root that is known to be in memory: then no call
%% waits for a device. `on_device' where it is not, or not known to be: write_and_publish/5 makes it
%% known.
-spec write_and_publish_in_memory(guard(), root(), save_plan(), Payload :: binary()) ->
    published() | {ok | more, tmp()} | on_device | failure().
write_and_publish_in_memory(_Guard, _Root, _Plan, _Payload) -> ?NOT_LOADED.

%% The payload is the same at each call. After an error the file is gone.
-spec write_more(turn(), guard(), tmp(), Payload :: binary()) -> ok | more | failure().
write_more(_Turn, _Guard, _Tmp, _Payload) -> ?NOT_LOADED.

%% Publishes what is written. Size and header are those of the file that now stands there.
-spec publish(turn(), guard(), tmp()) -> published() | more | failure().
publish(_Turn, _Guard, _Tmp) -> ?NOT_LOADED.

%% Closes the temporary file, and so removes it. Doing it twice, or after publishing, does nothing.
-spec abort(tmp()) -> ok.
abort(_Tmp) -> ?NOT_LOADED.

%% With a secret, a file has to have a digest that is keyed with it.
-spec load(turn(), root(), key(), none | secret()) ->
    {ok, erllama_cache_store:file_info(), Payload :: binary()}
    | {more, reference()} | miss | failure().
load(_Turn, _Root, _Key, _Secret) -> ?NOT_LOADED.

-spec load_more(turn(), reference()) ->
    {ok, erllama_cache_store:file_info(), Payload :: binary()} | more | failure().
load_more(_Turn, _Load) -> ?NOT_LOADED.

%% Closes the file and frees the memory. Doing it twice, or after the load's end, does nothing.
-spec load_abort(reference()) -> ok.
load_abort(_Load) -> ?NOT_LOADED.

%% Checks the key's file and removes it if it is corrupt: `false' if not, or if it has lost its name
%% meanwhile. With a secret, a file without a digest that is keyed with it stays.
-spec remove_corrupt(turn(), root(), key(), none | secret()) ->
    boolean() | {more, reference()} | miss | failure().
remove_corrupt(_Turn, _Root, _Key, _Secret) -> ?NOT_LOADED.

-spec remove_corrupt_more(turn(), reference()) -> boolean() | more | failure().
remove_corrupt_more(_Turn, _Removal) -> ?NOT_LOADED.

%% Begins to take over the file of a key, of so many bytes, which another node has. Of the options,
%% the digest is a secret or anything: with a secret, the file has to prove it.
-spec import_begin(turn(), root(), key(), Size :: pos_integer(), save_options()) ->
    {ok, reference()} | failure().
import_begin(_Turn, _Root, _Key, _Size, _Options) -> ?NOT_LOADED.

%% Writes the file's next bytes, some hundreds of kilobytes, and checks them as far as can be.
%% `more': the disk is far behind, nothing was written, and the same piece is to be given again.
%% After a failure nothing is left.
-spec import_write(turn(), reference(), Piece :: binary()) -> ok | more | failure().
import_write(_Turn, _Import, _Piece) -> ?NOT_LOADED.

%% Has import_receive/2 take the bytes from a stream socket, whose descriptor is this number. The
%% socket has to be the caller's own: nobody else may close it meanwhile.
-spec import_source(reference(), Socket :: non_neg_integer()) -> ok | failure().
import_source(_Import, _Socket) -> ?NOT_LOADED.

%% Writes and checks what the socket has, and never waits for the other side. `ok': all of the file
%% has come. `idle': nothing more is there yet. `closed': the other side has ended too early.
-spec import_receive(turn(), reference()) -> ok | more | idle | closed | failure().
import_receive(_Turn, _Import) -> ?NOT_LOADED.

%% Publishes the file when its last byte has come and all of it is proven: what a host is told of a
%% save. Size and header are those of the file that has the name now.
-spec import_publish(turn(), reference()) ->
    {ok, Size :: pos_integer(), Header :: binary(), erllama_cache_host:content()}
    | more | failure().
import_publish(_Turn, _Import) -> ?NOT_LOADED.

%% Drops what has come, if it is not published.
-spec import_abort(reference()) -> ok.
import_abort(_Import) -> ?NOT_LOADED.

%% What describes a key's payload, as its file has it. Only a load checks it.
-spec describe(turn(), root(), key(), none | secret()) ->
    {ok, erllama_cache_store:file_info()} | miss | failure().
describe(_Turn, _Root, _Key, _Secret) -> ?NOT_LOADED.

%% Queues a note in the key's file that it was used `Hits' more times and last at that unix second.
%% Another thread writes it later, or never where the write would block or copy the file. A hint.
-spec note_use(root(), key(), Hits :: 0..16#ffffffff, At :: non_neg_integer()) -> ok.
note_use(_Root, _Key, _Hits, _At) -> ?NOT_LOADED.

%% A number that changes when opening the root at a path leads to another directory than before; 0
%% when it was never opened. This looks up what is remembered and makes no system call.
-spec root_generation(root()) -> non_neg_integer().
root_generation(_Root) -> ?NOT_LOADED.

%% Verifies a stored file, its key included, without bringing it into memory.
-spec check(turn(), root(), key(), none | secret()) ->
    {ok, key_length(), Size :: pos_integer(), LastUsed :: non_neg_integer()}
    | {more, reference()} | miss | failure().
check(_Turn, _Root, _Key, _Secret) -> ?NOT_LOADED.

-spec check_more(turn(), reference()) ->
    {ok, key_length(), Size :: pos_integer(), LastUsed :: non_neg_integer()} | more | failure().
check_more(_Turn, _Check) -> ?NOT_LOADED.

%% Whether the root's file system can create files without a name.
-spec takes_unnamed(turn(), root()) -> boolean() | failure().
takes_unnamed(_Turn, _Root) -> ?NOT_LOADED.

%% Whether a file stands under the key's name. Its content is not checked.
-spec exists(turn(), root(), key()) -> boolean() | failure().
exists(_Turn, _Root, _Key) -> ?NOT_LOADED.

%% How many bytes of the root's file system this process may still use.
-spec free_bytes(turn(), root()) -> non_neg_integer() | failure().
free_bytes(_Turn, _Root) -> ?NOT_LOADED.

%% Removes the file of a key, and says whether there was one.
-spec delete(turn(), root(), key()) -> boolean() | failure().
delete(_Turn, _Root, _Key) -> ?NOT_LOADED.

%% With `KeyedOnly', files without a keyed digest are skipped. With `Removes', files that are proven
%% corrupt are removed, and temporary files that no save works on.
-spec scan(turn(), root(), KeyedOnly :: boolean(), Removes :: boolean()) ->
    {ok, reference()} | failure().
scan(_Turn, _Root, _KeyedOnly, _Removes) -> ?NOT_LOADED.

-spec scan_more(turn(), reference()) -> {ok | more, [found()]} | failure().
scan_more(_Turn, _Scan) -> ?NOT_LOADED.
