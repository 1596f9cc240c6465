%% Whether the project's own writer is in use in a node that runs the stand-in for erllama, or the
%% one of erllama_cache_nif. What is not so raises.
-module(erllama_cache_dropin).

-export([comes_from/1, original/0, ours/1, released/1, is_up/0]).

-type keyed_by() :: tokens | text.

%% The application whose module is in use. In a release its directory ends in the version.
-spec comes_from(Application :: atom()) -> ok.
comes_from(Application) ->
    Path = code:which(erllama_cache_writer),
    Directory = filename:basename(filename:dirname(filename:dirname(Path))),
    [Name | _] = string:split(Directory, "-"),
    Application = list_to_atom(Name),
    ok.

-spec original() -> ok.
original() ->
    ok = comes_from(erllama),
    {error, its_own} = save(),
    ok.

%% A save goes through this one, with the project's keys, reservations and counters, below the
%% project's supervisor.
-spec ours(keyed_by()) -> ok.
ours(KeyedBy) ->
    ok = comes_from(erllama_cache_nif),
    {ok, Key} = save(),
    {error, already_present} = save(),
    ok = is_file_of(Key, KeyedBy),
    [Key] = erllama_cache_meta_srv:stored(),
    #{5 := 1, 16 := 1} = erllama_cache_counters:all(),
    #{limit := 3, saves := 1} = erllama_cache_writer:info(),
    [{erllama_cache_writer, Writer, worker, _}] = supervisor:which_children(erllama_sup),
    Writer = whereis(erllama_cache_writer),
    [{erllama_cache_drain, _, worker, _}] = supervisor:which_children(erllama_cache_nif_sup),
    {ok, Theirs} = application:get_key(erllama, modules),
    {ok, Ours} = application:get_key(erllama_cache_nif, modules),
    [] = [Module || Module <- Ours, lists:member(Module, Theirs)],
    ok.

%% The same in a release, which loads all modules when it starts.
-spec released(keyed_by()) -> ok.
released(KeyedBy) ->
    embedded = code:get_mode(),
    ours(KeyedBy).

%% Whether a release that has been started is through with that.
-spec is_up() -> boolean().
is_up() ->
    lists:keymember(server, 1, application:which_applications()).

save() ->
    Meta = #{
        save_reason => continued, quant_bits => 16, quant_type => f16,
        fingerprint => <<1:256>>, fingerprint_mode => safe, ctx_params_hash => <<2:256>>,
        tokens => [1, 15043, 3186], prompt_text => <<"Hello world">>, context_size => 4096
    },
    erllama_cache_writer:save(tier, disk, Meta, <<"the model's state">>).

is_file_of(Key, KeyedBy) ->
    Name = <<(string:lowercase(binary:encode_hex(Key)))/binary, ".kvc">>,
    {ok, File} = file:read_file(filename:join(erllama_cache_disk_srv:dir(tier), Name)),
    Version = maps:get(KeyedBy, #{tokens => 1, text => 2}),
    <<"KVC", Version, _/binary>> = File,
    ok.
