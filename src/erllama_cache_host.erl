%% @doc What a save needs from its surroundings: a key, a reservation, a root, and somebody to tell.
%%
%% Two modules are such hosts: {@link erllama_cache_host_erllama}, over the application `erllama',
%% and {@link erllama_cache_store}, built in. The writer calls them in the process that saves, in
%% this order: `identify', `reserve', `root', then, the file being written, `check', the file being
%% published, `mark_published', `announce', `count'.
-module(erllama_cache_host).

-export_type([tier_srv/0, tier/0, identity/0, token/0, event/0]).

-type tier_srv() :: atom().
-type tier() :: disk | ram_file.
-type identity() :: {Key :: <<_:256>>, QuantByte :: byte(), Tokens :: binary()}.
%% The key, the byte that stands for the quant type, the tokens as u32 little-endian each.
-type token() :: reference().
-type event() :: {saved, erllama_cache_meta:save_reason()} | duplicate_dropped.

%% The key of a save, and what the host makes it from. An error leaves nothing behind.
-callback identify(erllama_cache_meta:complete()) ->
    {ok, identity()} | {error, erllama_cache_meta:invalid()}.

%% Reserves a key for the calling process. `Size' is what the file will take, within some bytes.
-callback reserve(tier_srv(), tier(), Key :: binary(), Size :: non_neg_integer()) ->
    {ok, token()} | {error, already_present | conflict | term()}.

%% The directory to save in. Exits when the tier server is not there.
-callback root(tier_srv()) -> file:name_all().

%% Whether the reservation still stands, and renews its lease of 60 seconds.
-callback check(tier_srv(), Key :: binary(), token()) -> ok | {error, expired}.

%% The file stands in the root, though nobody has been told.
-callback mark_published(tier_srv(), Key :: binary(), token(), Root :: file:name_all()) ->
    ok | {error, expired}.

%% The save is complete. `Size' is the file's in bytes, `Header' its first 48 bytes.
-callback announce(tier_srv(), Key :: binary(), token(), Size :: pos_integer(),
                   Header :: binary(), Tokens :: binary()) ->
    ok | {error, expired}.

%% Gives the reservation up; a stale one too.
-callback cancel(tier_srv(), Key :: binary(), token()) -> ok.

%% Something to be counted has happened.
-callback count(tier_srv(), event()) -> ok.
