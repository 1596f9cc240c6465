%% @doc What a save needs from its surroundings: a key, a reservation, a root, and an announcement.
%%
%% Two modules implement it: {@link erllama_cache_host_erllama}, over the application `erllama',
%% and {@link erllama_cache_store}, built in. The writer calls them in the process that saves:
%%
%% <ul>
%% <li>`keyed_by', once, when the writer starts.</li>
%% <li>`identify', first in each save, with a slot held. Its error ends the save.</li>
%% <li>`reserve', next. Its error ends the save; `already_present' is counted.</li>
%% <li>`root', next. Its error ends the save. It exits when there is no such tier server.</li>
%% <li>`check': before a small file is written; for any other file between writing and publishing,
%%   and every 15 seconds while it is written or waits for its turn. Its error ends the save: the
%%   temporary file is removed, and the reservation is not cancelled, for it is another's.</li>
%% <li>`mark_published' and `announce', when the file has its name. After their errors the file
%%   stays.</li>
%% <li>`count', after a save that succeeded, and for the other events.</li>
%% <li>`cancel', when anything failed between `reserve' and the publication.</li>
%% </ul>
-module(erllama_cache_host).

-export([recognise/1, locate/2]).
-export([lease/0, lease_left/0, renew_every/0]).
-export_type([tier_srv/0, tier/0, keyed_by/0, identity/0, content/0, token/0, event/0]).

-type tier_srv() :: atom().
-type tier() :: disk | ram_file.
-type keyed_by() :: tokens | text.
%% What a key is made of, beside fingerprint, quant byte and context parameters: the tokens, and the
%% file is of version 1; or the bytes of the prompt's text, and it is of version 2.
-type identity() :: {Key :: <<_:256>>, QuantByte :: byte(), content()}.
%% The key, the byte that stands for the quant type, and the content.
-type content() :: {keyed_by(), Tokens :: binary(), TextBytes :: non_neg_integer()}.
%% What the key is made of, the tokens as u32 little-endian each, and the size of the prompt's text.
-type token() :: reference().
-type event() :: {saved, erllama_cache_meta:save_reason()} | duplicate_dropped | dropped
               | {fetched, Bytes :: pos_integer()} | fetch_failed.
%% `dropped': a save behind its caller failed after the caller had its answer. The last two are of
%% files that a peer had, and come only where the configuration has `peers'.

%% A reservation's lease in milliseconds: erllama's, which the built-in store shares.
-define(LEASE, 60000).
%% A save renews its reservation this often, in milliseconds.
-define(RENEW_EVERY, 15000).

%% What the host makes keys of. Called when the writer starts, which fails with the error. A host
%% without this callback makes them of tokens.
-callback keyed_by() -> {ok, keyed_by()} | {error, term()}.

%% A load has found the file of this key corrupt, and it was removed. A host without this callback
%% keeps such files.
-callback corrupt(tier_srv(), Key :: binary()) -> ok.
-optional_callbacks([keyed_by/0, corrupt/2]).

%% The key of a save, and what it was made of. An error leaves nothing behind.
-callback identify(keyed_by(), erllama_cache_meta:complete()) ->
    {ok, identity()} | {error, erllama_cache_meta:invalid()}.

%% Reserves a key for the calling process. `Size' is the file's size, or some bytes more.
-callback reserve(tier_srv(), tier(), Key :: binary(), Size :: non_neg_integer()) ->
    {ok, token()} | {error, already_present | conflict | term()}.

%% The directory to save in. Exits when the tier server is not there.
-callback root(tier_srv()) -> file:name_all() | {error, term()}.

%% Renews the reservation's lease of 60 seconds, or says that the reservation was lost.
-callback check(tier_srv(), Key :: binary(), token()) -> ok | {error, expired}.

%% The file has its name in the root, but has not been announced.
-callback mark_published(tier_srv(), Key :: binary(), token(), Root :: file:name_all()) ->
    ok | {error, expired}.

%% The save is complete. `Size' is the file's size in bytes, `Header' its first 48 bytes.
-callback announce(tier_srv(), Key :: binary(), token(), Size :: pos_integer(),
                   Header :: binary(), content()) ->
    ok | {error, expired}.

%% Gives up the reservation, stale or not.
-callback cancel(tier_srv(), Key :: binary(), token()) -> ok.

%% Counts an event.
-callback count(tier_srv(), event()) -> ok.

%% @doc Asks a configuration's host what it makes keys of, and adds the answer.
-spec recognise(#{host := module(), Key => Value}) ->
    {ok, #{host := module(), keyed_by := keyed_by(), Key => Value}} | {error, term()} when
    Key :: atom(), Value :: term().
recognise(#{host := Host} = Config) ->
    _ = code:ensure_loaded(Host),
    Answer = case erlang:function_exported(Host, keyed_by, 0) of
        true -> Host:keyed_by();
        false -> {ok, tokens}
    end,
    case Answer of
        {ok, KeyedBy} -> {ok, Config#{keyed_by => KeyedBy}};
        {error, _} = Error -> Error
    end.

%% @private
%% A host's root, as it has it and as the system wants it. Exits when there is no such tier server.
-spec locate(module(), tier_srv()) ->
    {ok, file:name_all(), erllama_cache_nif:root()} | {error, term()}.
locate(Host, TierSrv) ->
    case Host:root(TierSrv) of
        {error, _} = Error ->
            Error;
        Root ->
            case erllama_cache_path:native(Root) of
                {ok, Path} -> {ok, Root, Path};
                {error, _} = Error -> Error
            end
    end.

%% @doc Milliseconds for which a reservation stands without being renewed.
-spec lease() -> pos_integer().
lease() -> ?LEASE.

%% @doc Milliseconds after which a save renews its reservation.
-spec renew_every() -> pos_integer().
renew_every() -> ?RENEW_EVERY.

%% @doc Milliseconds of the lease that must be left after each `check'. A host need not renew a
%% lease of which more is left: the save checks again before it ends.
-spec lease_left() -> pos_integer().
lease_left() -> ?LEASE - ?RENEW_EVERY.
